"""The convolutions of a network that can be factorised, and the cost of each form."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Float

from inertia_jax.calls import ApplyFn, Call, record_calls
from inertia_jax.compression.parameter_uses import find_misused
from inertia_jax.compression.planned import Planned
from inertia_jax.inputs import Shape
from inertia_jax.layers.factorised import cannot_factorise
from inertia_jax.layers.kinds import (
    OTHER_CONVOLUTIONS,
    OTHER_LINEAR,
    dense_kernel,
    kind_of,
    num_axes,
    spec_of,
)
from inertia_jax.models.network import Network
from inertia_jax.ops.conv.conv import per_axis
from inertia_jax.plan.plan import Plan, matches, plan_of
from inertia_jax.plan.specs import Conv, Inertial, LowRank, Tucker2, core_of
from inertia_jax.variables import plain_variables, subtree

Factorised = Tucker2 | LowRank


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution as it stands in a network.

    Attributes:
        path: The layer's path.
        kernel: The dense kernel [*sides, c_in / groups, c_out], multiplied out where
            the layer is factorised. It has a side for each axis of an image, and none
            where the layer is linear.
        groups: The number of groups of channels.
        strides: The stride along each axis.
        padding: The layer's padding, in the layer's own form.
        dilation: The dilation along each axis.
        calls: Shapes of input [*image, c_in] and output [*out, c_out] of every call,
            for one image.
        spec: The form of the layer.
        core: The ordinary convolution of that place, with the filters that the plan
            has for it.
        is_first: Whether it is the stem, the first of all convolutions, or of all
            layers where there is none.
    """

    path: str
    kernel: Float[np.ndarray, "*sides c_in c_out"]
    groups: int
    strides: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    calls: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    spec: Conv | Factorised
    core: Conv
    is_first: bool = False

    @property
    def num_axes(self) -> int:
        """The number of axes of an image; 0 for a linear layer."""
        return self.kernel.ndim - 2

    @property
    def is_linear(self) -> bool:
        """Whether the layer is linear, and no convolution."""
        return self.num_axes == 0

    @property
    def is_pointwise(self) -> bool:
        """Whether the filters have one tap, and no plan gave them this size."""
        return {*self.kernel.shape[:-2]} <= {1} and self.core == Conv()

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that the time of the layer depends on, besides its form."""
        steps = (self.strides, self.dilation, str(self.padding))
        return (self.kernel.shape, self.groups, self.calls, *steps)

    def macs(self, spec: Conv | Factorised) -> int:
        """Returns the multiply-accumulates per image in this form."""
        return sum(
            positions * math.prod(kernel) for positions, kernel in self._parts(spec)
        )

    def params(self, spec: Conv | Factorised) -> int:
        """Returns the number of parameters in this form, without the bias."""
        return sum(math.prod(kernel) for _, kernel in self._parts(spec))

    def kernel_shapes(self, spec: Conv | Factorised) -> list[tuple[int, ...]]:
        """Returns the shapes of the kernels that are applied one after another."""
        return [kernel for _, kernel in self._parts(spec)]

    def _parts(self, spec: Conv | Factorised) -> list[tuple[int, tuple[int, ...]]]:
        """Returns the number of positions and the shape of each kernel in turn."""
        *sides, c_in, c_out = self.kernel.shape
        ones = (1,) * len(sides)
        before = sum(math.prod(into[:-1]) for into, _ in self.calls)
        after = sum(math.prod(out[:-1]) for _, out in self.calls)
        if isinstance(spec, Tucker2):
            r_in, r_out = spec.rank_in, self.groups * spec.rank_out
            return [
                (before, (*ones, c_in, self.groups * r_in)),
                (after, (*sides, r_in, r_out)),
                (after, (*ones, spec.rank_out, c_out)),
            ]
        if isinstance(spec, LowRank):
            left = (*ones, c_in, self.groups * spec.rank)
            return [(after, left), (after, (*ones, spec.rank, c_out))]
        return [(after, (*sides, c_in, c_out))]


def find_sites(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Shape,
    *,
    apply_fn: ApplyFn | None = None,
) -> dict[str, Site]:
    """Returns the convolutions that can be factorised, by path, first to last.

    Raises:
        ValueError: A kernel that is not finite, or variables of another network.
    """
    variables = plain_variables(variables)
    return split_convolutions(model, variables, image_shape, apply_fn)[0]


def split_convolutions(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Shape,
    apply_fn: ApplyFn | None,
    *,
    linear: bool = False,
) -> tuple[dict[str, Site], dict[str, str]]:
    """Returns the convolutions that can be factorised, and why others cannot, by path.

    The variables are plain. With `linear`, linear layers are among them. Those that are
    factorised always are.

    Raises:
        ValueError: A kernel that is not finite, or variables of another network.
    """
    calls, kept, stem = find_kept(
        model, variables, image_shape, apply_fn, linear=linear
    )
    plan, sites = plan_of(model) or Plan(), {}
    for path, call in calls.items():
        if path in kept:
            continue
        module, leaves = call.module, leaves_at(variables, path)
        kernel = np.asarray(jax.device_get(dense_kernel(module, leaves)))
        if not np.isfinite(kernel).all():
            raise ValueError(f"the kernel of {path!r} must be finite; it is not.")
        core = core_of(plan.spec(path))
        sites[path] = Site(
            path=path,
            kernel=kernel,
            groups=getattr(module, "feature_group_count", 1),
            strides=_per_axis(module, "strides"),
            padding=getattr(module, "padding", "VALID"),
            dilation=_per_axis(module, "kernel_dilation"),
            calls=tuple((c.input_shape[1:], c.output_shape) for c in call.every),
            spec=Conv() if type(module) is nn.Dense else spec_of(module),
            core=core if isinstance(core, Conv) else Conv(),
            is_first=path == stem,
        )
    return sites, kept


def find_kept(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Shape,
    apply_fn: ApplyFn | None,
    *,
    linear: bool = False,
) -> tuple[dict[str, Call], dict[str, str], str]:
    """Returns the calls of convolutions, and why some cannot be factorised, by path.

    The variables are plain. Third is the path of the stem, `Site.is_first`.

    Raises:
        ValueError: Variables of another network.
    """
    calls, expected = record_calls(model, image_shape, apply_fn=apply_fn)
    inside = {path for path, call in calls.items() if call.is_factorised}
    convolutions = {
        path: call
        for path, call in calls.items()
        # A plan has no name for the network itself.
        if path
        and path.rpartition("/")[0] not in inside
        and _is_kernel(call.module, linear)
    }
    for path in convolutions:
        check_shapes(path, variables, expected)
    # Layers besides convolutions may have the shapes of other images.
    # Networks of this library use no kernels besides their layers.
    misused = find_misused(
        model,
        expected,
        image_shape,
        apply_fn,
        training=not isinstance(model, Network),
    )
    own, kept = _own_factors(model, calls, image_shape, apply_fn), {}
    for path, call in convolutions.items():
        module = call.module
        misuse = misused.get(path, "is not called in evaluation")
        reason = _cannot_replace(module, leaves_at(variables, path)) or misuse
        if path in own:
            reason = f"is a {type(module).__name__} of the model's own"
        if reason is not None:
            kept[path] = reason
    stems = [path for path, call in calls.items() if path and _is_stem(call.module)]
    return convolutions, kept, next(iter((*stems, *convolutions)), "")


def _own_factors(
    model: nn.Module,
    calls: Mapping[str, Call],
    image_shape: Shape,
    apply_fn: ApplyFn | None,
) -> set[str]:
    """Returns the paths of factorised layers that the model's own code makes."""
    made = {path for path, call in calls.items() if call.is_factorised}
    if plan_of(model) is None or not made:
        return made
    if not isinstance(model, Planned):
        return set()
    inside, _ = record_calls(model.unplanned, image_shape, apply_fn=apply_fn)
    return {path for path in made if path in inside and inside[path].is_factorised}


def check_shapes(
    path: str,
    variables: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    collections: Sequence[str] = ("params",),
) -> None:
    """Raises ValueError unless the variables of a layer have their shapes."""
    for collection in collections:
        leaves = leaves_at(variables, path, collection)
        for name, leaf in leaves_at(expected, path, collection).items():
            found = np.shape(leaves[name]) if name in leaves else "missing"
            if found != tuple(leaf.shape):
                raise ValueError(
                    f"`variables` do not belong to `model`: {path}/{name} is {found}, "
                    f"must be {tuple(leaf.shape)}."
                )


def leaves_at(
    variables: Mapping[str, Any], path: str, collection: str = "params"
) -> dict[str, Any]:
    """Returns the variables of a layer, those of its parts as `PART/kernel`."""
    leaves = subtree(variables.get(collection, {}), path)
    return traverse_util.flatten_dict(leaves, sep="/")


def layer_places(params: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns the names along the path of each layer; a name may have a "/" in it."""
    flat = traverse_util.flatten_dict(dict(params))
    return {"/".join(place[:-1]): place[:-1] for place in flat}


def reasons(kept: Mapping[str, str], glob: str) -> str:
    """Returns why some convolutions that a glob matches stay, for an error."""
    found = [f"{p!r} {why}" for p, why in kept.items() if matches(p, glob)]
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return "".join(f"; {reason}" for reason in (*found[:3], *more))


def with_leaves(
    variables: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns variables with other parameters (as from `leaves_at`) at some paths."""
    kept: dict[tuple[str, ...], Any] = {}
    flat = traverse_util.flatten_dict(variables["params"], keep_empty_nodes=True)
    for place, leaf in flat.items():
        # Names may have a "/" in them, so that a path does not say where it is cut.
        ends = [n for n in range(1, len(place)) if "/".join(place[:n]) in changed]
        if not ends:
            kept[place] = leaf
            continue
        layer = place[: ends[0]]
        for name, value in changed["/".join(layer)].items():
            kept[(*layer, *name.split("/"))] = value
    return {**variables, "params": traverse_util.unflatten_dict(kept)}


def _per_axis(module: Any, name: str) -> tuple[int, ...]:
    """Returns the numbers of a field of a layer, one for each axis; 1 without it."""
    return per_axis(getattr(module, name, None) or 1, name, count=num_axes(module))


def _is_stem(module: Any) -> bool:
    """Returns whether a layer is a convolution, of whatever kind."""
    is_one = isinstance(module, OTHER_CONVOLUTIONS) or kind_of(module).spec is not None
    return is_one and num_axes(module) > 0


def _is_kernel(module: Any, linear: bool) -> bool:
    """Returns whether a layer is a convolution, or a linear layer, of one kernel."""
    if isinstance(module, (nn.Dense, *OTHER_LINEAR)):
        return linear
    if isinstance(module, OTHER_CONVOLUTIONS):
        return True
    kind = kind_of(module)
    if kind.spec is None:
        return False
    return kind.spec is Conv or not isinstance(core_of(spec_of(module)), Inertial)


def _cannot_replace(module: Any, leaves: Mapping[str, Any]) -> str | None:
    """Returns why no factors can stand for the kernel of a convolution, or None."""
    if not kind_of(module).parts:
        if reason := cannot_factorise(module):
            return reason
        if others := sorted(leaves.keys() - {"kernel", "bias"}):
            return f"holds parameters of other layers: {', '.join(others)}"
    # A layer in `nn.scan` or `nn.vmap` is called on one of them.
    ndim = num_axes(module) + 2
    if any(np.ndim(leaf) != ndim for name, leaf in leaves.items() if "kernel" in name):
        return "holds the kernels of several layers, as in nn.scan and nn.vmap"
    return None
