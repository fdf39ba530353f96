"""Merges BatchNorm into the convolution before it: same function, fewer layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from inertia_jax.calls import ApplyFn
from inertia_jax.compression.parameter_uses import find_misused
from inertia_jax.compression.sites import check_shapes
from inertia_jax.deploy.fold_trace import trace_layers, uses_running_average
from inertia_jax.inputs import Shape
from inertia_jax.intercept import Answer, Wrapper
from inertia_jax.layers.batch_norm import BatchNormToTrain
from inertia_jax.layers.in_place import own_arithmetic
from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.kinds import KINDS, num_axes, output_kernel
from inertia_jax.layers.tucker import Tucker2Conv
from inertia_jax.models.create import image_shape_of
from inertia_jax.variables import plain_variables

_SEVERAL = "holds the variables of several layers"


class Folded(Wrapper):
    """A network in evaluation mode without the BatchNorm that its kernels contain.

    Variables have the same names as those of the network. The parameters and statistics
    of the merged BatchNorm layers are gone, and each layer that one was merged into has
    a bias.

    Attributes:
        unfolded: The network.
        folded: Pairs of paths, a layer and the BatchNorm merged into it.
        kept: Pairs of a BatchNorm's path and the reason why it could not be merged.

    Raises:
        ValueError: The network is called in training mode.

    Example:
        >>> from flax import linen as nn
        >>> network = nn.Sequential(
        ...     [nn.Conv(4, 3), nn.BatchNorm(use_running_average=True)]
        ... )
        >>> first = network.init(jax.random.key(0), jnp.ones((1, 8, 3)))
        >>> folded, merged = ij.fold_batch_norm(network, first, image_shape=(8, 3))
        >>> folded.folded, folded.kept
        ((('layers_0', 'layers_1'),), ())
    """

    unfolded: nn.Module
    folded: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def wrapped(self) -> nn.Module:
        return self.unfolded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("train"):
            raise ValueError(_no_training(self.unfolded))
        return super().__call__(*args, **kwargs)

    @nn.nowrap
    def make_answer(self, *, train: bool) -> Answer:
        layers = {layer for layer, _ in self.folded}
        norms = {norm for _, norm in self.folded}

        def replace(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
            if type(module) in (nn.BatchNorm, BatchNormToTrain) and path in norms:
                if not uses_running_average(module, args, kwargs):
                    raise ValueError(_no_training(self.unfolded))
                return _as_normalised(module, args[0] if args else kwargs["x"])
            if type(module) in KINDS and path in layers:
                # A layer with a bias takes this one's place, so that the model's code,
                # which knows of no bias, need not change.
                merged = ["use_bias"] + ["is_folded"] * (type(module) is Tucker2Conv)
                if not all(getattr(module, name) for name in merged):
                    options = dict.fromkeys(merged, True)
                    layer = module.clone(parent=module.scope.rewound(), **options)
                    return layer(*args, **kwargs)
            return call(*args, **kwargs)

        return replace


def fold_batch_norm(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: Shape | None = None,
    apply_fn: ApplyFn | None = None,
) -> tuple[Folded, dict[str, Any]]:
    """Merges every BatchNorm that directly follows a convolution into its kernel.

    With running mean mu, variance v, scale g and offset h, an output channel becomes

        g (K x + b - mu) / sqrt(v + epsilon) + h = (s K) x + (s (b - mu) + h),
        s = g / sqrt(v + epsilon)

    so that kernel and bias can contain it. These are the kernel and bias of `nn.Conv`
    and `nn.Dense`, of the last factor of a Tucker-2 or low-rank convolution with any
    core, and of an inertial core. Friction is measured on the input, so gates stay as
    they are (up to the rounding of that input). Detail that is linear in the core
    scales with it. A BatchNorm stays, and `model.kept` says why, after

    - an inertial convolution with `combine="max"`, where a scale is negative;
    - an inertial convolution with `combine="stack"`, where two channels share a filter;
    - anything else than one such layer whose output nothing else uses, also if the
      layer is called twice, or inside `nn.scan` or `nn.vmap`;
    - a layer whose variables are used outside of it, too (tied weights, a penalty that
      the network returns), or are transformed on the way (`nn.map_variables`); and
      where this is true of BatchNorm's own;
    - a layer that convolves or multiplies by a function of its own.

    The model is not edited: its trace shows which layer each BatchNorm follows.
    Checkpoints hold networks that can be trained further; fold after loading one.

    Args:
        model: A network; one that is folded comes back as it is.
        variables: Its trained variables; they are not changed.
        image_shape: The shape [h, w, c] of an input. None: the one that a network of
            this library was published for.
        apply_fn: How the network is called, as in `compress`.

    Returns:
        (model, variables) of the same function in evaluation mode, up to rounding.

    Raises:
        ValueError: No `image_shape` where it is needed, or variables that are not the
            model's.

    Example:
        >>> from flax import linen as nn
        >>> network = nn.Sequential(
        ...     [nn.Conv(4, 3), nn.BatchNorm(use_running_average=True)]
        ... )
        >>> first = network.init(jax.random.key(0), jnp.ones((1, 8, 3)))
        >>> folded, merged = ij.fold_batch_norm(network, first, image_shape=(8, 3))
        >>> sorted(merged["params"]), "batch_stats" in merged
        (['layers_0'], False)
    """
    variables = plain_variables(variables)
    if isinstance(model, Folded):
        return model, variables
    shape = image_shape_of(model, image_shape)
    trace = trace_layers(model, shape, apply_fn)
    misused = find_misused(model, trace.variables, shape, apply_fn)
    # Names may have a "/" in them, so that a path does not say where it is cut.
    places = {
        "/".join(place): place for place in traverse_util.flatten_dict(dict(variables))
    }
    flat = {
        "/".join(place): leaf
        for place, leaf in traverse_util.flatten_dict(dict(variables)).items()
    }
    folded: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []
    for path, norm in trace.norms.items():
        layer = trace.layer_before.get(path)
        if path in trace.by_batch:
            kept.append((path, "normalises by each batch in evaluation, too"))
            continue
        if layer is None:
            kept.append((path, "does not follow one layer that nothing else uses"))
            continue
        check_shapes(layer, variables, trace.variables)
        both = ("params", "batch_stats")
        check_shapes(path, variables, trace.variables, collections=both)
        reason: str | None = None
        module = trace.layers[layer]
        kernel = flat.get(_kernel_path(layer, module))
        if kernel is not None and np.ndim(kernel) != num_axes(module) + 2:
            reason = _SEVERAL
        elif why := own_arithmetic(module) or misused.get(layer):
            reason = f"follows {layer!r}, which {why}"
        else:
            reason = misused.get(path) or _merge(flat, layer, module, path, norm)
        if reason is None:
            folded.append((layer, path))
        else:
            kept.append((path, reason))
    merged: dict[str, Any] = {name: {} for name in variables if name != "batch_stats"}
    merged |= traverse_util.unflatten_dict(
        {_place(path, places): leaf for path, leaf in flat.items()}
    )
    return Folded(model, tuple(folded), tuple(kept)), merged


def _no_training(model: nn.Module) -> str:
    return (
        f"`train` (=True) must be False: BatchNorm of this {type(model).__name__} is "
        f"folded into its kernels; train the network that was folded."
    )


def _as_normalised(module: nn.BatchNorm, x: jax.Array) -> jax.Array:
    """Returns `x` in the type that BatchNorm would return it in."""
    weights = [module.param_dtype] * (module.use_scale + module.use_bias)
    return x.astype(module.dtype or jnp.result_type(x, *weights))


def _kernel_path(path: str, layer: Any) -> str:
    return f"params/{path}/{output_kernel(layer)}"


def _place(path: str, places: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the place of a variable; a new bias stands beside its kernel."""
    if path in places:
        return places[path]
    return (*places[f"{path.removesuffix('/bias')}/kernel"][:-1], "bias")


def _merge(
    flat: dict[str, Any],
    layer_path: str,
    layer: Any,
    norm_path: str,
    norm: nn.BatchNorm,
) -> str | None:
    """Merges a BatchNorm into `flat`; or changes nothing, and returns why."""
    combine = layer.combine if isinstance(layer, InertialConv) else None
    if norm.axis != -1:
        return f"normalises axis {norm.axis}, not the channels"
    if combine == "stack":
        return "follows combine='stack', whose filters serve two channels each"

    def wide(path: str) -> np.ndarray:
        return np.asarray(flat[path]).astype(np.float64)

    kernel_at = _kernel_path(layer_path, layer)
    bias_at = f"{kernel_at.removesuffix('/kernel')}/bias"
    mean = wide(f"batch_stats/{norm_path}/mean")
    scale = 1 / np.sqrt(wide(f"batch_stats/{norm_path}/var") + norm.epsilon)
    if norm.use_scale:
        scale = scale * wide(f"params/{norm_path}/scale")
    if scale.ndim != 1:
        return _SEVERAL
    if combine == "max" and scale.min() < 0:
        return "follows combine='max' and has a negative scale"
    shift = scale * ((wide(bias_at) if layer.use_bias else 0) - mean)
    if norm.use_bias:
        shift = shift + wide(f"params/{norm_path}/bias")
    dtype = flat[kernel_at].dtype
    flat[kernel_at] = jnp.asarray((wide(kernel_at) * scale).astype(dtype))
    flat[bias_at] = jnp.asarray(shift.astype(dtype))
    for path in [p for p in flat if p.partition("/")[2].startswith(f"{norm_path}/")]:
        del flat[path]
    return None
