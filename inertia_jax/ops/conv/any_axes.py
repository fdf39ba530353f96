"""Convolution over any number of axes: sequences, images, volumes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.conv import Padding, conv2d, pads_per_axis, per_axis


def conv(
    x: Float[ArrayLike, "n *image c_in"],
    kernel: Float[ArrayLike, "*sides c_in_group c_out"],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    precision: Any = None,
) -> Float[Array, "n *out c_out"]:
    """Convolves as `conv2d` does, along as many axes as the kernel has sides.

    Args:
        x: Images of any number of axes.
        kernel: Filters; `c_in_group` is `c_in / groups`.
        strides: Distance between output positions: one for all axes, or one each.
        padding: Zeros around, as `conv2d` takes it, with a pair for each axis.
        dilation: Distance between filter taps: one for all axes, or one each.
        groups: Number of groups of channels that do not mix.
        precision: The products' precision, as `jax.lax.conv_general_dilated` takes it.

    Returns:
        The output map, in the type that `x` and `kernel` promote to.

    Raises:
        ValueError: Channels or axes of `x` and `kernel` do not match, or an argument is
            outside its range.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    strides, dilation = (1 if v is None else v for v in (strides, dilation))
    if kernel.ndim == 4:
        return conv2d(
            x,
            kernel,
            strides=strides,
            padding=padding,
            dilation=dilation,
            groups=groups,
            precision=precision,
        )
    if x.ndim != kernel.ndim or x.ndim < 3:
        raise ValueError(
            f"`x` (shape {x.shape}) must have the axes of images, as many as `kernel` "
            f"(shape {kernel.shape}) has sides, besides images and channels."
        )
    if groups < 1 or kernel.shape[-1] % groups:
        raise ValueError(
            f"`groups` (={groups}) must divide the {kernel.shape[-1]} output channels."
        )
    if x.shape[-1] != kernel.shape[-2] * groups:
        raise ValueError(
            f"`kernel` (shape {kernel.shape}, `groups` {groups}) must take "
            f"{x.shape[-1]} channels, as `x` (shape {x.shape}) has."
        )
    count = x.ndim - 2
    dtype = jnp.result_type(x, kernel)
    image, sides = (0, count + 1, *range(1, count + 1)), range(count)
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        window_strides=per_axis(strides, "strides", count=count, least=1),
        padding=pads_per_axis(padding, count=count),
        rhs_dilation=per_axis(dilation, "dilation", count=count, least=1),
        dimension_numbers=lax.ConvDimensionNumbers(
            image, (count + 1, count, *sides), image
        ),
        feature_group_count=groups,
        precision=precision,
    )
