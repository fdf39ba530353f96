"""Two-dimensional convolution, NHWC by HWIO, on `lax.conv_general_dilated`."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

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
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    window_strides, taps = pair(strides), pair(dilation)
    direct = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding_pairs(padding),
        rhs_dilation=taps,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    size = kernel.shape[:2]
    is_small = any(
        n < 1 + (k - 1) * d for n, k, d in zip(x.shape[1:3], size, taps, strict=True)
    )
    pads = explicit_padding(x.shape[1:3], size, window_strides, padding, taps)
    # On CPU, XLA has slow cases. Elsewhere these forms are not measured, so not used.
    on_cpu: Callable[[Array, Array], Array] | None = None
    if groups == 1 and (size == (1, 1) or is_small):
        # 409 ms against 4 for 3x3 at [64,2,2,512], an image smaller than the kernel;
        # and 4 times as long for the gradient of a 1x1 convolution.
        on_cpu = functools.partial(
            _conv2d_as_product, strides=window_strides, pads=pads, dilation=taps
        )
    elif window_strides == (1, 1) and pads == ((0, 0), (0, 0)):
        # 30 ms without padding against 10 with it for 3x3 at [64,26,26,32] to 64.
        padded = functools.partial(direct, padding=((1, 1), (1, 1)))
        on_cpu = lambda x, kernel: padded(x, kernel)[:, 1:-1, 1:-1]  # noqa: E731
    if on_cpu is None:
        return direct(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=direct)


def conv_for_linen(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Padding,
    *,
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    **_: object,
) -> Array:
    """`conv2d` in the form in which `nn.Conv` takes its convolution."""
    return conv2d(
        lhs,
        rhs,
        strides=window_strides,
        padding=padding,
        dilation=rhs_dilation,
        groups=feature_group_count,
    )


def explicit_padding(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns `padding` as pairs of numbers, for an image of this size."""
    pads = padding_pairs(padding)
    if not isinstance(pads, str):
        return pads
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    top, left = lax.padtype_to_pads(image_size, spans, strides, pads)
    return (pair(top), pair(left))


def _conv2d_as_product(
    x: Array,
    kernel: Array,
    *,
    strides: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
) -> Array:
    """Convolves by one matrix product over all taps side by side."""
    kh, kw, c_in, c_out = kernel.shape
    # Not jnp.pad, which refuses negative padding, a crop.
    around = ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), around)
    n, h, w, _ = x.shape
    last_row, last_column = h - (kh - 1) * dilation[0], w - (kw - 1) * dilation[1]
    views = [
        lax.slice(
            x,
            (0, i * dilation[0], j * dilation[1], 0),
            (n, i * dilation[0] + last_row, j * dilation[1] + last_column, c_in),
            (1, *strides, 1),
        )
        for i in range(kh)
        for j in range(kw)
    ]
    patches = jnp.concatenate(views, axis=-1) if len(views) > 1 else views[0]
    return jnp.einsum("nhwp,po->nhwo", patches, kernel.reshape(-1, c_out))
