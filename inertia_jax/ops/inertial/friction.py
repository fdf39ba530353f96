"""Friction: how much a region's periphery differs from its middle."""

import functools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.conv import Padding, pad_image, stride_pair
from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.inertial.settings import (
    Metric,
    Reference,
    check_choice,
    check_sizes,
)
from inertia_jax.ops.inertial.views import (
    region_grid,
    shifted_views,
    square_offsets,
    total,
)
from inertia_jax.ops.precision import at_least_float32


def periphery_offsets(*, core_size: int, region_size: int) -> list[tuple[int, int]]:
    """Returns the (row, column) of each pixel of P, the region less its middle patch.

    The middle patch is the `core_size` square at (k // 2, k // 2), k = `region_size` -
    `core_size`. Where the region's side is even and the core's is 1, the reference
    pixel `region_size` // 2 lies in P; that is meant.
    """
    start = (region_size - core_size) // 2
    patch = range(start, start + core_size)
    square = square_offsets(region_size)
    return [(i, j) for i, j in square if not (i in patch and j in patch)]


def friction(
    x: Float[ArrayLike, "n h w c"],
    *,
    region_size: int,
    core_size: int,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    metric: Metric = "l1",
    reference: Reference = "center",
    channel_stride: int = 1,
) -> Float[Array, "n h_out w_out"]:
    """Returns how much each region's periphery P differs from its reference r.

    Means are taken over the channels c and, except for `max`, over the pixels q of P:

        l1     mean_q,c |x_q - r|
        l2     mean_q,c (x_q - r)^2
        max    max_q mean_c |x_q - r|

    P is the region of side d less its middle patch of side m; r is the region's pixel
    (d // 2, d // 2) or the mean of the middle patch, channel by channel. A NaN anywhere
    in what is compared makes the friction NaN, which opens the gate.

    Args:
        x: Images.
        region_size: Side d of the region, in pixels, > `core_size`.
        core_size: Side m of the middle patch, in pixels, >= 1.
        strides: Distance between regions, in pixels.
        padding: Zeros around the image: "SAME" (XLA's rule for a window of side d),
            "VALID", an integer, or pairs; negative pairs crop.
        metric: `l1`, `l2` or `max`; `random` is a control, noise in [0, 1) that is
            hashed from the reference pixel and the region's place.
        reference: `center` or `core_mean`.
        channel_stride: Step over the channels that are compared, >= 1.

    Returns:
        Friction >= 0, in float32, or float64 for float64; in the units of `x`, squared
        for `l2`.

    Raises:
        ValueError: An argument is outside its range, or an image smaller than a region.

    Example:
        >>> edge = jnp.zeros((1, 6, 6, 1)).at[:, :, 3:].set(1)
        >>> ij.ops.friction(edge, region_size=3, core_size=1, padding="VALID")[0, 0]
        Array([0.   , 0.375, 0.375, 0.   ], dtype=float32)
    """
    check_sizes(core_size=core_size, region_size=region_size)
    check_choice("metric", metric, Metric)
    check_choice("reference", reference, Reference)
    if channel_stride < 1:
        raise ValueError(f"`channel_stride` (={channel_stride}) must be >= 1.")
    if jnp.ndim(x) != 4 or not jnp.shape(x)[-1]:
        raise ValueError(f"`x` (shape {jnp.shape(x)}) must be [n, h, w, c], c >= 1.")
    x, steps = jnp.asarray(x), stride_pair(strides)
    pads, output_size = region_grid(x.shape[1:3], region_size, steps, padding)
    x, dtype = pad_image(x, pads), at_least_float32(x.dtype)

    def views(offsets: Sequence[tuple[int, int]]) -> Iterator[Array]:
        narrow = shifted_views(
            x,
            offsets,
            output_size=output_size,
            strides=steps,
            channel_stride=channel_stride,
        )
        return (view.astype(dtype) for view in narrow)

    middle = region_size // 2
    (center,) = views([(middle, middle)])
    if metric == "random":
        return _noise(center)
    # Everything is taken relative to the middle pixel: differences of near values are
    # exact, where sums of squares less squares of sums lose every digit.
    start = (region_size - core_size) // 2
    patch = [(start + i, start + j) for i, j in square_offsets(core_size)]
    level = jnp.zeros((), dtype)
    if reference == "core_mean":
        level = total(view - center for view in views(patch)) / len(patch)
    offsets = periphery_offsets(core_size=core_size, region_size=region_size)
    differences = ((view - center) - level for view in views(offsets))
    if metric == "max":
        means = (_channel_mean(jnp.abs(difference)) for difference in differences)
        return functools.reduce(jnp.maximum, means)
    power = jnp.abs if metric == "l1" else jnp.square
    return _channel_mean(total(map(power, differences)) / len(offsets))


def _channel_mean(x: Float[Array, "n h w c"]) -> Float[Array, "n h w"]:
    def product(x: Array) -> Array:
        # XLA's CPU sum over the last axis is not vectorised: friction of
        # [64,32,32,64] takes 6 ms with it and 1 ms with a matrix product.
        ones = jnp.full((x.shape[-1],), 1 / x.shape[-1], x.dtype)
        return jnp.dot(x, ones, precision="highest")

    # Whoever replaces convolutions may replace products: friction has no weights.
    return by_platform(x, cpu=product, default=lambda x: x.mean(-1))


def _noise(center: Float[Array, "n h w c"]) -> Float[Array, "n h w"]:
    """Hashes pixels and places to [0, 1), the same way however a batch is split."""
    n, h, w, c = center.shape
    # The sum of integers over channels does not depend on the order of summation.
    pixels = lax.bitcast_convert_type(center.astype(jnp.float32), jnp.uint32)
    factors = jnp.arange(c, dtype=jnp.uint32) * 2 + jnp.uint32(0x9E3779B1)
    content = (pixels * factors.reshape(1, 1, 1, c)).sum(-1, dtype=jnp.uint32)
    place = jnp.arange(h * w, dtype=jnp.uint32).reshape(1, h, w)
    bits = content ^ jnp.broadcast_to(place * jnp.uint32(0x9E3779B9), (n, h, w))
    # This is MurmurHash3's finaliser (public domain): each bit of the input moves all.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits >> 8).astype(center.dtype) / 2**24
