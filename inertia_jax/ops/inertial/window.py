"""Inertial convolution, window reading: one region per output position."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from inertia_jax.ops.conv.conv import (
    Padding,
    conv2d,
    in_one_type,
    mix_channels,
    pad_image,
    stride_pair,
)
from inertia_jax.ops.conv.replaced import is_replaced
from inertia_jax.ops.inertial.friction import friction as region_friction
from inertia_jax.ops.inertial.friction import periphery_offsets
from inertia_jax.ops.inertial.gates import is_open, select
from inertia_jax.ops.inertial.settings import (
    Combine,
    GateGradient,
    Metric,
    Reference,
    check_choice,
    check_sizes,
    check_slope,
)
from inertia_jax.ops.inertial.views import (
    region_grid,
    shifted_views,
    square_offsets,
    sum_views,
)
from inertia_jax.ops.precision import at_least_float32


class InertialOutput(NamedTuple):
    """The result of an inertial convolution.

    Attributes:
        y: Output map, [n, h_out, w_out, c_out].
        gate: True where detail was computed, [n, regions_h, regions_w], with a last
            axis of channels where the threshold has one.
        friction: Friction of each region, [n, regions_h, regions_w], in float32 or
            float64.

    Example:
        >>> out = ij.ops.inertial_conv(
        ...     images, jnp.ones((1, 1, 1, 2)), region_size=3, threshold=0.5
        ... )
        >>> out.y.shape, out.gate.shape, out.friction.dtype
        ((16, 28, 28, 2), (16, 28, 28), dtype('float32'))
    """

    y: Float[Array, "n h_out w_out c_out"]
    gate: Bool[Array, "n rows columns *c"]
    friction: Float[Array, "n rows columns"]


def weights_shape(
    combine: Combine,
    *,
    core_size: int,
    region_size: int,
    c_in: int,
    core_features: int,
) -> tuple[int, ...] | None:
    """Returns the shape of the weights that `combine` takes; None if it takes none."""
    steps = region_size - core_size + 1
    return {
        "weighted": (steps, steps),
        "weighted_channel": (steps, steps, core_features),
        "weighted_input": (steps, steps, c_in),
        "weighted_periphery": (region_size**2 - core_size**2,),
    }.get(combine)


def inertial_conv(
    x: Float[ArrayLike, "n h w c_in"],
    core: Float[ArrayLike, "m m c_in c_core"],
    *,
    region_size: int,
    threshold: Float[ArrayLike, "*c_core"],
    metric: Metric = "l1",
    reference: Reference = "center",
    combine: Combine = "mean",
    weights: Float[ArrayLike, "..."] | None = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    gate_gradient: GateGradient = "none",
    slope: float = 10.0,
    channel_stride: int = 1,
    friction: Float[ArrayLike, "n h_out w_out"] | None = None,
) -> InertialOutput:
    """Applies a core once per region, and all over the region where friction is high.

    With u_delta(p) the core applied at region p shifted by delta in {0..k}^2,
    k = d - m, and delta0 = (k // 2, k // 2):

        y(p) = u_delta0(p)             where friction(p) <= threshold
        y(p) = S_delta u_delta(p)      elsewhere, so also where friction is NaN

    S is `mean`, `sum` or `max`; `weighted` (weights [n, n], n = k + 1) and
    `weighted_channel` ([n, n, c_core]) weigh the sum; `weighted_input` ([n, n, c_in])
    weighs the input before a second core evaluation; `stack` returns u_delta0 and the
    gated mean side by side, with twice the core's channels. `weighted_periphery`
    ([d^2 - m^2], row by row) knows no shifts: it applies the middle tap (m // 2,
    m // 2) of the core to each pixel of the periphery, and weighs the sum. All but the
    last and `weighted_input` take u_delta as shifts of one core map over the padded
    input; at larger strides, joins that are linear over the input take two core
    evaluations at the output's positions, which are fewer.

    Args:
        x: Images.
        core: Filters of side m, one per output channel; for `stack`, one per two.
        region_size: Side d of the region, > m.
        threshold: Friction above which the gate opens, one number or one per core
            channel.
        metric: Measure of friction, as `friction` takes it.
        reference: Reference r of friction, as `friction` takes it.
        combine: Join S of the shifted core responses.
        weights: Weights of the weighted joins; None for the others.
        strides: Distance between regions, in pixels.
        padding: Zeros around the image; "SAME" is XLA's rule applied to the region.
        gate_gradient: Gradient through the gate, `none` or `ste`, as `select` takes it.
        slope: Steepness of `ste`, per unit of friction, > 0.
        channel_stride: Step over the channels that friction reads, >= 1.
        friction: Friction of each region where it is known already; None computes it.

    Returns:
        `InertialOutput(y, gate, friction)`.

    Raises:
        ValueError: The core is not square or not smaller than the region, weights are
            missing, surplus or misshapen, or another argument is out of range.

    Example:
        >>> edge = jnp.zeros((1, 6, 6, 1)).at[:, :, 3:].set(3)
        >>> out = ij.ops.inertial_conv(
        ...     edge,
        ...     jnp.ones((1, 1, 1, 1)),
        ...     region_size=3,
        ...     threshold=0.1,
        ...     padding="VALID",
        ... )
        >>> out.gate[0, 0].tolist()
        [False, True, True, False]
        >>> out.y[0, 0, :, 0].round().astype(int).tolist()
        [0, 1, 2, 3]
    """
    x, core, threshold = jnp.asarray(x), jnp.asarray(core), jnp.asarray(threshold)
    check_core(x, core, region_size=region_size)
    check_choice("combine", combine, Combine)
    check_choice("gate_gradient", gate_gradient, GateGradient)
    if threshold.shape not in ((), core.shape[3:]):
        raise ValueError(
            f"`threshold` (shape {threshold.shape}) must be one number, or "
            f"{core.shape[3]}, one per core channel."
        )
    check_slope(slope)
    m, d = core.shape[0], region_size
    weights = _check_weights(weights, combine, core, region_size=d)
    x, core = in_one_type(x, core)
    steps = stride_pair(strides)
    pads, size = region_grid(x.shape[1:3], d, steps, padding)
    if friction is None:
        friction = region_friction(
            x,
            region_size=d,
            core_size=m,
            strides=steps,
            padding=pads,
            metric=metric,
            reference=reference,
            channel_stride=channel_stride,
        )
    else:
        friction = as_friction(friction, (x.shape[0], *size))
    threshold = threshold.astype(friction.dtype)
    low, high = _responses(
        pad_image(x, pads),
        core,
        weights,
        combine,
        region_size=d,
        strides=steps,
        output_size=size,
    )
    y = select(
        high,
        jnp.zeros_like(high) if combine == "stack" else low,
        friction[..., None],
        threshold.reshape(1, 1, 1, -1),
        gate_gradient=gate_gradient,
        slope=slope,
    )
    if combine == "stack":
        y = jnp.concatenate([low, y], axis=-1)
    # A threshold per channel has a gate per channel.
    if threshold.ndim == 0:
        gate = is_open(friction, threshold)
    else:
        gate = is_open(friction[..., None], threshold.reshape(1, 1, 1, -1))
    return InertialOutput(y, gate, friction)


def as_friction(friction: ArrayLike, shape: tuple[Any, ...]) -> Array:
    """Returns known friction as friction is computed: in float32 at least.

    Raises:
        ValueError: Its shape is not `shape`.
    """
    known = jnp.asarray(friction)
    if known.shape != shape:
        raise ValueError(
            f"`friction` (shape {known.shape}) must have shape {shape}, one entry per "
            "region."
        )
    return known.astype(at_least_float32(known.dtype))


def _check_weights(
    weights: ArrayLike | None, combine: Combine, core: Array, *, region_size: int
) -> Array | None:
    shape = weights_shape(
        combine,
        core_size=core.shape[0],
        region_size=region_size,
        c_in=core.shape[2],
        core_features=core.shape[3],
    )
    if shape is None and weights is not None:
        raise ValueError(f"`weights` must be None for `combine` (={combine!r}).")
    if shape is None:
        return None
    if weights is None or jnp.shape(weights) != shape:
        found = "=None" if weights is None else f"shape {jnp.shape(weights)}"
        raise ValueError(
            f"`weights` ({found}) must have shape {shape} for `combine` (={combine!r})."
        )
    return jnp.asarray(weights)


def _responses(
    x: Float[Array, "n hp wp c_in"],
    core: Float[Array, "m m c_in c_core"],
    weights: Array | None,
    combine: Combine,
    *,
    region_size: int,
    strides: tuple[int, int],
    output_size: tuple[int, int],
) -> tuple[Array, Array]:
    """Returns u_delta0 and S u_delta of every region of the padded image `x`."""
    m = core.shape[0]
    k = region_size - m
    evaluate = functools.partial(conv2d, strides=strides, padding="VALID")
    if combine == "weighted_periphery" and weights is not None:
        at = periphery_offsets(core_size=m, region_size=region_size)
        rows, columns = np.transpose(at)
        square = jnp.zeros((region_size, region_size), weights.dtype)
        weights = square.at[rows, columns].set(weights)[..., None]
        if m > 1:
            joined = sum_views(x, weights, side=region_size)
            return _core_and_tap(_middle(x, k), joined, core, strides)
    elif weights is not None:
        weights = weights.reshape(k + 1, k + 1, -1)
    elif combine != "sum":
        weights = jnp.full((k + 1, k + 1, 1), 1 / (k + 1) ** 2)

    # At strides > 1 a core map holds positions that no region starts at. A linear join
    # may sum the input instead, and evaluate the core only where it is needed.
    by_input = combine not in ("max", "weighted_channel") and strides != (1, 1)
    if by_input or combine == "weighted_input":
        (rows, columns), (vertical, horizontal) = output_size, strides
        span = ((rows - 1) * vertical + m, (columns - 1) * horizontal + m)
        x = x[:, : span[0] + k, : span[1] + k]
        middle, joined = _middle(x, k), sum_views(x, weights, side=k + 1)
        if is_replaced():  # It sees the core once, and each image by itself.
            low, high = jnp.split(evaluate(jnp.concatenate([middle, joined]), core), 2)
            return low, high
        return evaluate(middle, core), evaluate(joined, core)
    spans = [
        (size - 1) * s + region_size
        for size, s in zip(output_size, strides, strict=True)
    ]
    core_map = conv2d(x[:, : spans[0], : spans[1]], core, padding="VALID")
    views = functools.partial(
        shifted_views, core_map, output_size=output_size, strides=strides
    )
    (low,) = views([(k // 2, k // 2)])
    if combine == "max":
        return low, functools.reduce(jnp.maximum, views(square_offsets(k + 1)))
    high = sum_views(core_map, weights, side=k + 1)
    return low, high[:, :: strides[0], :: strides[1]]


def _middle(x: Float[Array, "n hp wp c_in"], k: int) -> Float[Array, "n h w c_in"]:
    """Returns the part of the padded image that cores at delta0 read."""
    start = k // 2
    rows, columns = (slice(start, start + side - k) for side in x.shape[1:3])
    return x[:, rows, columns]


def _core_and_tap(
    x: Float[Array, "n hp wp c_in"],
    joined: Float[Array, "n h w c_in"],
    core: Float[Array, "m m c_in c_core"],
    strides: tuple[int, int],
) -> tuple[Array, Array]:
    """Returns the core at every region of `x`, and its middle tap at `joined`."""
    m = core.shape[0]
    joined = joined[:, :: strides[0], :: strides[1]]
    n, rows, columns, c = joined.shape
    if not is_replaced():
        low = conv2d(x, core, strides=strides, padding="VALID")
        return low, mix_channels(joined, core[m // 2, m // 2])
    # It sees the core once: cores lie side by side, zeros around what the tap reads.
    offsets = square_offsets(m)
    views = shifted_views(x, offsets, output_size=(rows, columns), strides=strides)
    alone = [
        joined if at == (m // 2, m // 2) else jnp.zeros_like(joined) for at in offsets
    ]
    regions = jnp.stack(
        [jnp.concatenate(pair) for pair in zip(views, alone, strict=True)], 3
    )
    blocks = regions.reshape(2 * n, rows, columns, m, m, c).swapaxes(2, 3)
    blocks = blocks.reshape(2 * n, rows * m, columns * m, c)
    low, high = jnp.split(conv2d(blocks, core, strides=m, padding="VALID"), 2)
    return low, high


def check_core(x: Array, core: Array, *, region_size: int) -> None:
    """Raises ValueError unless `core` is [m, m, c_in, features], m < `region_size`."""
    if core.ndim != 4 or core.shape[0] != core.shape[1]:
        raise ValueError(f"`core` (shape {core.shape}) must be [m, m, c_in, c_out].")
    check_sizes(core_size=core.shape[0], region_size=region_size)
    if x.ndim != 4 or x.shape[-1] != core.shape[2]:
        raise ValueError(
            f"`core` (shape {core.shape}) must take the channels of `x` (shape "
            f"{x.shape}), an [n, h, w, c_in]."
        )
