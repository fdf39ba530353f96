"""Two-dimensional convolution, NHWC by HWIO, on `lax.conv_general_dilated`."""

from collections.abc import Sequence

from jax import Array, lax
from jaxtyping import Float
from jax.typing import ArrayLike
import jax.numpy as jnp

Padding = str | int | Sequence[int | tuple[int, int]]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Returns `value` as (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def padding_pairs(padding: Padding) -> str | tuple[tuple[int, int], tuple[int, int]]:
    """Returns `padding` as `((top, bottom), (left, right))`, or as "SAME" or "VALID".

    Raises:
        ValueError: A padding that is none of these.
    """
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"`padding` (={padding!r}) must be SAME, VALID or pairs.")
        return padding
    if isinstance(padding, int):
        return ((padding, padding), (padding, padding))
    if len(padding) != 2:
        raise ValueError(f"`padding` (={padding!r}) must have one entry a dimension.")
    top, left = padding
    return (pair(top), pair(left))


def conv2d(
    x: Float[ArrayLike, "n h w c_in"],
    kernel: Float[ArrayLike, "kh kw c_in_group c_out"],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves images with a kernel (cross-correlation, as in every network library).

    Args:
        x: Images.
        kernel: Filters; `c_in_group` is `c_in / groups`.
        strides: Distance between output positions, in pixels.
        padding: Zeros around the image: "SAME" (XLA's rule), "VALID", an integer, or
            pairs `((top, bottom), (left, right))`.
        dilation: Distance between filter taps, in pixels.
        groups: Number of groups of channels that do not mix.

    Returns:
        The output map, in the type that `x` and `kernel` promote to.

    Raises:
        ValueError: Channels of `x` and `kernel` do not match, or a bad padding.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    dtype = jnp.result_type(x, kernel)
    if x.shape[-1] != kernel.shape[2] * groups:
        raise ValueError(
            f"`kernel` (shape {kernel.shape}, `groups` {groups}) must take "
            f"{x.shape[-1]} channels, as `x` (shape {x.shape}) has."
        )
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        window_strides=pair(strides),
        padding=padding_pairs(padding),
        rhs_dilation=pair(dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
