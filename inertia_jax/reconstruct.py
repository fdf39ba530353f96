"""Layer-wise reconstruction: kernels fitted to what the dense layers put out."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.calibration import (
    apply_as_trained,
    batch_norm_paths,
    batched,
    checked_images,
)
from inertia_jax.calls import check_in_view, first_argument, record_calls
from inertia_jax.inertial_layer import InertialConv
from inertia_jax.kinds import kind_of, linear_parts
from inertia_jax.layer_fit import LayerFit, Seen
from inertia_jax.plan import Plan
from inertia_jax.sites import leaves_at, with_leaves

# So that two are held out, which BatchNorm needs.
LEAST_IMAGES = 8
# What the layers of one program see of a batch: all of it is held at once.
_PROGRAM_BYTES = 1 << 29

Network = tuple[nn.Module, Mapping[str, Any]]


def reconstruct(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    dense: Network,
    images: Float[ArrayLike, "n h w c"],
    layers: str = "*",
    iterations: int = 12,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Fits the kernels of a compressed network to the outputs of the dense one.

    Layer after layer, first to last, by least squares over images and positions:

        W <- argmin_W  sum_i || f(x_i; W) - y_i ||^2

    where y_i are the dense layer's outputs in the dense network, and x_i the inputs of
    the layer in the compressed network, whose earlier layers have been fitted already:
    so a layer also makes up for what those before it lost. f is linear in a kernel, so
    that a few steps of conjugate gradients, from the kernel as it is, go most of the
    way. A quarter of the images is held out, to choose after how many steps to stop: a
    kernel that no step improves there stays. The factors of a layer are fitted one
    after another. Layers whose gates choose a maximum (`combine="max"`) are left as
    they are, and what stands before an inertial core.

    Labels are not needed. BatchNorm normalises with the statistics of each batch
    meanwhile; `recalibrate_batch_norm` comes after. Thresholds and the mean of relative
    friction are taken as they are stored, and stay; rates of open gates follow the
    layers' inputs, by little.

    Args:
        model: A network that `compress` or `make_inertial` returned.
        variables: Its variables.
        dense: (model, variables) of the network that it was made from.
        images: Some thousand of the network's inputs, as training saw them, at least
            8; of those held out and of the others, what fills no whole batch is left
            out. Inputs and outputs of one layer are in memory for all of them.
        layers: Glob over the paths of the convolutions that may change. Layers that
            already put out what the dense ones do stay bit for bit.
        iterations: Most steps of conjugate gradients for each factor, >= 1.
        batch_size: Images a call, >= 2; a quarter of all if that is less.

    Returns:
        Variables with other kernels, and biases where layers have them.

    Raises:
        ValueError: A glob that matches no convolution, one inside `nn.scan`, `nn.remat`
            or their like, a dense network that has other layers, other shapes or
            BatchNorm elsewhere, too few images, or images or outputs that are not
            finite.

    References:
        Zhang et al., 2016, https://arxiv.org/abs/1505.06798, section 3.3 (asymmetric
        reconstruction)
    """
    if iterations < 1:
        raise ValueError(f"`iterations` (={iterations}) must be >= 1.")
    if batch_size < 2:
        raise ValueError(f"`batch_size` (={batch_size}) must be >= 2.")
    checked = checked_images(images, "images")
    if len(checked) < LEAST_IMAGES:
        raise ValueError(f"`images` (={len(checked)}) must be at least {LEAST_IMAGES}.")
    if batch_norm_paths(variables) != batch_norm_paths(dense[1]):
        raise ValueError(
            "`dense` must have BatchNorm where `model` has it; fold after fitting."
        )
    num_held_out = len(checked) // 4
    size = min(batch_size, num_held_out)
    fitting = batched(checked[:-num_held_out], size)
    held_out = batched(checked[-num_held_out:], size)
    model, dense = _without_ladders(model), (_without_ladders(dense[0]), dense[1])
    calls, _ = record_calls(model, checked.shape[1:])
    modules = {path: call.module for path, call in calls.items()}
    paths = [
        path
        for path, module in modules.items()
        if path
        and fnmatch.fnmatchcase(path, layers)
        and linear_parts(module)
        and not kind_of(modules.get(path.rpartition("/")[0])).parts
    ]
    if not paths:
        raise ValueError(
            f"`layers` (={layers!r}) matches no convolution that can be fitted."
        )
    see = _watcher(tuple(paths), (model, variables), dense, fitting[0])
    changed = dict(variables)
    for path in paths:
        others = {
            collection: leaves_at({"params": tree}, path)
            for collection, tree in changed.items()
            if collection != "params"
        }
        leaves = _fitted(
            LayerFit(modules[path], others),
            linear_parts(modules[path]),
            leaves_at(changed, path),
            see(path, changed, fitting),
            see(path, changed, held_out),
            iterations,
        )
        changed = with_leaves(changed, {path: leaves})
    return changed


def _fitted(
    layer: LayerFit,
    parts: tuple[str, ...],
    leaves: Mapping[str, Any],
    seen: list[Seen],
    held_out: list[Seen],
    iterations: int,
) -> Mapping[str, Any]:
    """Returns a layer's parameters, fitted part after part."""
    for part in parts:
        leaves = layer.fit(leaves, part, seen, held_out, iterations)
    return leaves


def _without_ladders(model: nn.Module) -> nn.Module:
    """Returns the model with layers that compile sooner, where a plan makes them."""
    plan = getattr(model, "plan", None)
    return (
        model
        if not isinstance(plan, Plan)
        else model.clone(plan=plan.without_ladders())
    )


def _watcher(
    paths: tuple[str, ...], compressed: Network, dense: Network, batch: np.ndarray
) -> Callable[[str, Mapping[str, Any], list[np.ndarray]], list[Seen]]:
    """Returns a function from a layer, variables and batches to the layer's calls.

    One program gives what many layers see: to compile one a layer takes longer than to
    compute the layers after it in vain.

    Raises:
        ValueError: The dense network has no such layers, or other shapes of outputs;
            of the function: something is not finite.
    """
    calls = jax.eval_shape(_calls_of(paths, compressed[0]), compressed[1], batch)
    there = jax.eval_shape(_calls_of(paths, dense[0]), dense[1], batch)
    for path in paths:
        own, wanted = ([y.shape for _, y in of[path]] for of in (calls, there))
        if own != wanted:
            raise ValueError(
                f"`dense` puts out {wanted} at {path!r}; must be {own}, as `model` "
                f"does."
            )
    programs: dict[str, tuple[Any, Any]] = {}
    for group in _groups({path: calls[path] for path in paths}):
        inputs = jax.jit(_calls_of(group, compressed[0], which=0))
        outputs = jax.jit(_calls_of(group, dense[0], which=1))
        programs |= dict.fromkeys(group, (inputs, outputs))

    def see(
        path: str, variables: Mapping[str, Any], batches: list[np.ndarray]
    ) -> list[Seen]:
        inputs, outputs = programs[path]
        seen = []
        for batch in batches:
            before = inputs(variables, batch)[path]
            wanted = outputs(dense[1], batch)[path]
            for x, y in zip(before, wanted, strict=True):
                if not bool(jnp.isfinite(x).all() & jnp.isfinite(y).all()):
                    raise ValueError(
                        f"inputs and outputs of {path!r} must be finite; some are not."
                    )
                seen.append(Seen(x, y))
        return seen

    return see


def _groups(calls: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns layers in groups that see at most `_PROGRAM_BYTES` of a batch."""
    groups: list[tuple[str, ...]] = []
    held = 0
    for path, of in calls.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(of))
        if not groups or held + size > _PROGRAM_BYTES:
            groups.append(())
            held = 0
        groups[-1] += (path,)
        held += size
    return groups


def _calls_of(
    paths: tuple[str, ...], model: nn.Module, *, which: int | None = None
) -> Callable[[Mapping[str, Any], Array], dict[str, list[Any]]]:
    """Returns a function from variables and a batch to every call of some layers.

    Args:
        paths: Of the layers.
        model: Their network.
        which: 0 for the calls' inputs, 1 for their outputs, None for pairs of both; in
            float32 or wider.
    """

    def calls(variables: Mapping[str, Any], batch: Array) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {path: [] for path in paths}
        depth = dict.fromkeys(paths, 0)
        roots: list[Any] = []

        def record(
            call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            is_call = context.method_name == "__call__"
            path = "/".join(context.module.path)
            is_wanted = is_call and path in found
            check_in_view(context.module, roots, is_wanted=is_wanted)
            if is_call and isinstance(context.module, InertialConv):
                # As in evaluation: no batch moves a threshold.
                kwargs = {**kwargs, "train": False}
            if not is_wanted:
                return call(*args, **kwargs)
            # What stands in for a layer has its path, too.
            depth[path] += 1
            output = call(*args, **kwargs)
            depth[path] -= 1
            if not depth[path]:
                x = jnp.asarray(first_argument(args, kwargs))
                wide = jnp.promote_types(x.dtype, jnp.float32)
                pair = (x.astype(wide), output.astype(wide))
                found[path].append(pair if which is None else pair[which])
            return output

        with nn.intercept_methods(record):
            apply_as_trained(model, variables, batch)
        return found

    return calls
