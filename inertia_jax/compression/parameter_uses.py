"""Finds layers whose variables the network does not pass on as they are stored."""

import collections
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from inertia_jax.calls import ApplyFn, apply_network, takes_train
from inertia_jax.inputs import Shape, one_input
from inertia_jax.intercept import on_calls
from inertia_jax.layers.kinds import kind_of
from inertia_jax.programs import programs_inside

# Names of layers, and of their variables and collections, in the trace. No path holds
# the two characters that surround it.
_LAYER = re.compile("\x02([^\x03]*)\x03")
_LEAF = re.compile("\x02([^\x03]*)\x03(.*)")

# Operations that take the same operands as the program inside them.
_CALLS = {
    *("jit", "pjit", "checkpoint", "remat2", "closed_call", "core_call"),
    *("custom_jvp_call", "custom_vjp_call"),
}
# Operations that return a value as it is, or as it is in another type.
_COPIES = {
    *("name", "sharding_constraint", "copy", "copy_p", "optimization_barrier"),
    "convert_element_type",
}


def find_misused(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Shape,
    apply_fn: ApplyFn | None,
    *,
    training: bool = False,
) -> dict[str, str | None]:
    """Returns why no others can replace the variables of a layer, by path.

    The reason is None where others can. Layers that are not called are left out.

    The layers are convolutions of all kinds, linear layers and BatchNorm. One computes
    with other variables, such as factors, what it did with its own if those that it is
    called with are stored at its path, and if nothing else uses them. Both are seen in
    the trace of the network: every layer names the variables that it is called with,
    and these are followed from those of the network. Nothing is computed.

    Args:
        model: The network.
        variables: Its variables for such images, plain, or their shapes.
        image_shape: The shape of one input.
        apply_fn: How the network is called, as in `compress`.
        training: Whether the network is looked at in training, too, if it can be called
            so. A layer is called in evaluation, or left out.
    """
    trace = functools.partial(_traced, model, variables, image_shape, apply_fn)
    found = trace(train=False)
    if training and takes_train(model, apply_fn):
        try:
            trained = trace(train=True)
        except Exception:
            # It is not trained in this way: over a mesh, perhaps, by other code.
            return found
        for path, reason in found.items():
            if reason is None and (in_training := trained.get(path)):
                found[path] = f"{in_training}, in training"
    return found


def _traced(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Shape,
    apply_fn: ApplyFn | None,
    *,
    train: bool,
) -> dict[str, str | None]:
    """Returns what `find_misused` does, of one mode."""

    def mark(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        if kind_of(module).name == "other" and not isinstance(module, nn.BatchNorm):
            return call(*args, **kwargs)
        for collection, tree in module.variables.items():
            for name, leaf in traverse_util.flatten_dict(tree, sep="/").items():
                checkpoint_name(leaf, f"\x02{path}\x03{name}\x03{collection}")
        with jax.named_scope(f"\x02{path}\x03"):
            return call(*args, **kwargs)

    places = traverse_util.flatten_dict(dict(variables))

    def forward(leaves: list[Any], images: Any) -> Any:
        every = traverse_util.unflatten_dict(dict(zip(places, leaves, strict=True)))
        return apply_network(
            model,
            every,
            images,
            train=train,
            apply_fn=apply_fn,
            mutable=("batch_stats", "thresholds", "intermediates") if train else (),
        )[0]

    images = one_input(image_shape)
    with on_calls(mark):
        jaxpr = jax.make_jaxpr(forward)([*places.values()], images).jaxpr
    uses = _Uses()
    stored = [f"{'/'.join(path)}\x03{collection}" for collection, *path in places]
    uses.read(uses.follow(jaxpr, stored))
    return uses.reasons()


class _Uses:
    """The uses of stored parameters in a program."""

    def __init__(self) -> None:
        self._called_with = collections.defaultdict[str, set[bool]](set)
        self._read: set[str] = set()

    def reasons(self) -> dict[str, str | None]:
        """Returns why other parameters could not replace those of a layer, by path."""
        found: dict[str, str | None] = {}
        for path, is_stored in self._called_with.items():
            found[path] = None
            if not all(is_stored):
                found[path] = (
                    "is called with parameters that differ, or may, from those stored"
                )
            elif any(place.startswith(f"{path}/") for place in self._read):
                found[path] = "has parameters that are also used outside of it"
        return found

    def read(self, places: Sequence[str | None]) -> None:
        """Records that what is stored at some places is used outside of its layer."""
        self._read.update(filter(None, places))

    def follow(self, jaxpr: Any, operands: Sequence[str | None]) -> list[str | None]:
        """Records the uses in a program of operands that are stored, by place.

        Returns:
            The place of each result that is stored, too, and None for the others.
        """
        holds = dict(zip(map(id, jaxpr.invars), operands, strict=False))
        for eqn in jaxpr.eqns:
            places = [holds.get(id(var)) for var in eqn.invars]
            if named := _LEAF.match(str(eqn.params.get("name"))):
                path, name = named.groups()
                self._called_with[path].add(places[0] == f"{path}/{name}")
                continue
            start, stop = _passed_on(eqn)
            layers = _LAYER.findall(str(eqn.source_info.name_stack))
            for i, place in enumerate(places):
                if place and any(place.startswith(f"{path}/") for path in layers):
                    places[i] = None  # a layer does with its own what it likes
            results = [
                self.follow(inner, places[start:stop]) for inner in programs_inside(eqn)
            ]
            if eqn.primitive.name in _COPIES:
                holds |= {id(eqn.outvars[0]): places[0]}
                continue
            self.read(places[:start] + places[stop:])
            if eqn.primitive.name in _CALLS:
                # `nnx.jit` and `nnx.remat` return what they were given.
                holds |= dict(zip(map(id, eqn.outvars), results[0], strict=True))
            else:
                self.read(list(itertools.chain.from_iterable(results)))
        return [holds.get(id(var)) for var in jaxpr.outvars]


def _passed_on(eqn: Any) -> tuple[int, int]:
    """Returns which operands are those of the program inside, from its first on."""
    name, count = eqn.primitive.name, len(eqn.invars)
    if name in _CALLS:
        return 0, count
    if name == "cond":
        return 1, count
    if name == "scan":
        # What a loop carries or slices is not what it was. Slices lack an axis inside.
        # (JAX's versions differ in how they count these operands.)
        body = next(programs_inside(eqn))
        return 0, _alike(eqn.invars, body.invars) - _alike(eqn.outvars, body.outvars)
    return 0, 0


def _alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Returns how many variables of a loop have the same shape inside of it."""
    pairs = zip(outside, inside, strict=True)
    return sum(out.aval.shape == var.aval.shape for out, var in pairs)
