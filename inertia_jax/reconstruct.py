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

from inertia_jax.calibration import apply_as_trained, batched, checked_images
from inertia_jax.calls import first_argument, record_calls
from inertia_jax.layer_fit import OF_PARTS, LayerFit, Seen, linear_parts
from inertia_jax.plan import Plan
from inertia_jax.sites import leaves_at, with_leaves


def reconstruct(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    dense: tuple[nn.Module, Mapping[str, Any]],
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
    after another; gates stay where friction and threshold put them.

    Labels are not needed, and costs stay as they are. `recalibrate_batch_norm` comes
    after. BatchNorm normalises with the statistics of each batch meanwhile.

    Args:
        model: A network that `compress` or `make_inertial` returned.
        variables: Its variables.
        dense: (model, variables) of the network that it was made from.
        images: Some thousand of the network's inputs, as training saw them, at least
            two; of those held out and of the others, what fills no whole batch is left
            out. Inputs and outputs of one layer are in memory for all of them.
        layers: Glob over the paths of the convolutions that may change. Layers that
            already put out what the dense ones do stay bit for bit.
        iterations: Most steps of conjugate gradients for each factor, >= 1.
        batch_size: Images a call.

    Returns:
        Variables with other kernels, and biases where layers have them.

    Raises:
        ValueError: A glob that matches no convolution, a dense network that has other
            layers or other shapes, fewer than two images, or images or outputs that are
            not finite.

    References:
        Zhang et al., 2016, https://arxiv.org/abs/1505.06798, section 3.3 (asymmetric
        reconstruction)
    """
    if iterations < 1:
        raise ValueError(f"`iterations` (={iterations}) must be >= 1.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be >= 1.")
    checked = checked_images(images, "images")
    if len(checked) < 2:
        raise ValueError(f"`images` (={len(checked)}) must be at least 2.")
    held_out = max(1, len(checked) // 4)
    batches = batched(checked[:-held_out], batch_size)
    batches_held_out = batched(checked[-held_out:], batch_size)
    model = _with_still_gates(model)
    calls, _ = record_calls(model, checked.shape[1:])
    found = {path: call.module for path, call in calls.items()}
    parts = {
        path: linear_parts(module)
        for path, module in found.items()
        if path
        and fnmatch.fnmatchcase(path, layers)
        and not isinstance(found.get(path.rpartition("/")[0]), OF_PARTS)
    }
    parts = {path: names for path, names in parts.items() if names}
    if not parts:
        raise ValueError(
            f"`layers` (={layers!r}) matches no convolution that can be fitted."
        )
    changed = dict(variables)
    for path, names in parts.items():
        see = _watcher(path, (model, changed), dense)
        seen, seen_held_out = see(batches), see(batches_held_out)
        leaves = leaves_at(changed, path)
        others = {
            collection: leaves_at({"params": tree}, path)
            for collection, tree in changed.items()
            if collection != "params"
        }
        layer = LayerFit(found[path], others)
        for name in names:
            leaves = layer.fit(leaves, name, seen, seen_held_out, iterations)
        changed = with_leaves(changed, {path: leaves})
    return changed


def _with_still_gates(model: nn.Module) -> nn.Module:
    """Returns the model with thresholds that batches do not move, and no ladders."""
    plan = getattr(model, "plan", None)
    if not isinstance(plan, Plan):
        return model
    return model.clone(plan=plan.with_fixed_thresholds().without_ladders())


def _watcher(
    path: str,
    compressed: tuple[nn.Module, Mapping[str, Any]],
    dense: tuple[nn.Module, Mapping[str, Any]],
) -> Callable[[list[np.ndarray]], list[Seen]]:
    """Returns a function from batches to every call of a layer on them.

    It raises ValueError where the dense network has no such layer, or another shape of
    output, or where something is not finite.
    """
    inputs = jax.jit(lambda v, batch: _calls_of(path, compressed[0], v, batch))
    outputs = jax.jit(lambda v, batch: _calls_of(path, dense[0], v, batch))

    def watch(batches: list[np.ndarray]) -> list[Seen]:
        seen = []
        for batch in batches:
            before = inputs(compressed[1], batch)
            wanted = outputs(dense[1], batch)
            shapes = [y.shape for _, y in before], [y.shape for _, y in wanted]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"`dense` puts out {shapes[1]} at {path!r}; must be {shapes[0]}, "
                    f"as `model` does."
                )
            for (x, _), (_, y) in zip(before, wanted, strict=True):
                if not bool(jnp.isfinite(x).all() & jnp.isfinite(y).all()):
                    raise ValueError(
                        f"inputs and outputs of {path!r} must be finite; some are not."
                    )
                seen.append(Seen(x, y))
        return seen

    return watch


def _calls_of(
    path: str, model: nn.Module, variables: Mapping[str, Any], batch: Array
) -> list[tuple[Array, Array]]:
    """Returns input and output of every call of a layer, in float32 or wider."""
    found: list[tuple[Array, Array]] = []
    depth = 0

    def record(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        nonlocal depth
        is_it = "/".join(context.module.path) == path
        is_it = is_it and context.method_name == "__call__"
        # What stands in for a layer has its path, too.
        depth += is_it
        output = call(*args, **kwargs)
        depth -= is_it
        if is_it and not depth:
            x = jnp.asarray(first_argument(args, kwargs))
            wide = jnp.promote_types(x.dtype, jnp.float32)
            found.append((x.astype(wide), output.astype(wide)))
        return output

    with nn.intercept_methods(record):
        apply_as_trained(model, variables, batch)
    return found
