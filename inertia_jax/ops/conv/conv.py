"""Two-dimensional convolution, NHWC by HWIO, on `lax.conv_general_dilated`."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.conv.replaced import is_replaced

Padding = str | int | Sequence[int | tuple[int, int]]
Pads = tuple[tuple[int, int], tuple[int, int]]
MixingForm = Literal["convolution", "product"]

# What XLA takes for a side of an array.
_MOST = 2**31 - 1


def per_axis(
    value: Any, name: str = "value", *, count: int, least: int | None = None
) -> tuple[int, ...]:
    """Returns one integer, or one for each of `count` axes, as one for each.

    Raises:
        ValueError: `value` is neither, or is below `least`; the message has `name`.
    """
    try:
        sizes = [operator.index(size) for size in np.atleast_1d(np.asarray(value))]
    except TypeError:
        sizes = []
    if len(sizes) == 1:
        sizes *= count
    is_large = any(abs(size) > _MOST for size in sizes)
    if len(sizes) != count or is_large or (least is not None and min(sizes) < least):
        number = {1: "an integer", 2: "one or two integers"}
        rule = number.get(count, f"one or {count} integers")
        rule += "" if least is None else f" >= {least}"
        rule += f", at most {_MOST}" if is_large else ""
        raise ValueError(f"`{name}` (={value!r:.200}) must be {rule}.")
    return tuple(sizes)


def filter_sides(kernel_size: Any) -> tuple[int, ...]:
    """Returns the sides of a filter, one for each axis; one number is a square.

    Raises:
        ValueError: It is neither, or has a side below 1.
    """
    count = len(kernel_size) if np.ndim(kernel_size) else 2
    return per_axis(kernel_size, "kernel_size", count=count, least=1)


def pair(
    value: Any, name: str = "value", *, least: int | None = None
) -> tuple[int, int]:
    """Returns one integer, or two, as (vertical, horizontal).

    Raises:
        ValueError: `value` is neither, or is below `least`; the message has `name`.
    """
    vertical, horizontal = per_axis(value, name, count=2, least=least)
    return (vertical, horizontal)


def stride_pair(strides: int | Sequence[int] | None) -> tuple[int, int]:
    """Returns `strides` as (vertical, horizontal); None, as Flax has it, means 1.

    Raises:
        ValueError: `strides` is not one or two integers >= 1.
    """
    return pair(1 if strides is None else strides, "strides", least=1)


def pads_per_axis(padding: Padding, *, count: int) -> str | tuple[tuple[int, int], ...]:
    """Returns `padding` as a pair for each of `count` axes, or in capital letters.

    Raises:
        ValueError: `padding` is neither a rule's name nor made of integers.
    """
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                f"`padding` (={padding!r:.200}) must be SAME, SAME_LOWER, VALID or "
                f"pairs."
            )
        return padding.upper()
    if isinstance(padding, int | np.integer):
        return (pair(int(padding), "padding"),) * count
    if not isinstance(padding, Sequence | np.ndarray) or len(padding) != count:
        raise ValueError(
            f"`padding` (={padding!r:.200}) must have one entry per dimension."
        )
    return tuple(pair(around, "padding") for around in padding)


def padding_pairs(padding: Padding) -> str | Pads:
    """Returns `padding` as `((top, bottom), (left, right))`, or in capital letters.

    Raises:
        ValueError: `padding` is neither a rule's name nor made of integers.
    """
    pads = pads_per_axis(padding, count=2)
    return pads if isinstance(pads, str) else (pads[0], pads[1])


def conv2d(
    x: Float[ArrayLike, "n h w c_in"],
    kernel: Float[ArrayLike, "kh kw c_in_group c_out"],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: Any = None,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves images with a kernel (cross-correlation, as in every network library).

    Args:
        x: Images.
        kernel: Filters; `c_in_group` is `c_in / groups`.
        strides: Distance between output positions, in pixels.
        padding: Zeros around the image: "SAME" (XLA's rule), "SAME_LOWER", "VALID", an
            integer, or pairs `((top, bottom), (left, right))`.
        dilation: Distance between filter taps, in pixels.
        groups: Number of groups of channels that do not mix.
        precision: The products' precision, as `jax.lax.conv_general_dilated` takes it.

    Returns:
        The output map, in the type that `x` and `kernel` promote to.

    Raises:
        ValueError: Channels of `x` and `kernel` do not match, or an argument is outside
            its range.

    Example:
        >>> ij.ops.conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
        Array([[4., 6., 6., 4.],
               [6., 9., 9., 6.],
               [6., 9., 9., 6.],
               [4., 6., 6., 4.]], dtype=float32)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    for name, array in (("x", x), ("kernel", kernel)):
        if array.ndim != 4:
            raise ValueError(f"`{name}` (shape {array.shape}) must have four axes.")
    if groups < 1 or kernel.shape[3] % groups:
        raise ValueError(
            f"`groups` (={groups}) must divide the {kernel.shape[3]} output channels."
        )
    if x.shape[-1] != kernel.shape[2] * groups:
        raise ValueError(
            f"`kernel` (shape {kernel.shape}, `groups` {groups}) must take "
            f"{x.shape[-1]} channels, as `x` (shape {x.shape}) has."
        )
    x, kernel = in_one_type(x, kernel)
    window_strides = stride_pair(strides)
    taps = pair(dilation, "dilation", least=1)
    direct = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding_pairs(padding),
        rhs_dilation=taps,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )
    if is_replaced():
        return direct(x, kernel)
    size = kernel.shape[:2]
    spans = [1 + (k - 1) * d for k, d in zip(size, taps, strict=True)]
    is_small = any(n < span for n, span in zip(x.shape[1:3], spans, strict=True))
    pads = explicit_padding(x.shape[1:3], size, window_strides, padding, taps)
    if not kernel.size or any(
        n + sum(around) < span
        for n, around, span in zip(x.shape[1:3], pads, spans, strict=True)
    ):
        return direct(x, kernel)  # The map is empty, or sums of nothing.
    # XLA has slow cases on CPU. These forms were not measured elsewhere, so they are
    # not used there.
    on_cpu: Callable[[Array, Array], Array] | None = None
    if groups == 1 and (size == (1, 1) or is_small):
        # For 3x3 at [64,2,2,512], images smaller than the kernel, XLA takes 409 ms and
        # the product 4; the gradient of a 1x1 convolution takes XLA 4 times as long.
        on_cpu = functools.partial(
            _conv2d_as_product,
            strides=window_strides,
            pads=pads,
            dilation=taps,
            precision=precision,
        )
    elif window_strides == (1, 1) and pads == ((0, 0), (0, 0)):
        # A 3x3 at [64,26,26,32] to 64 takes 30 ms without padding and 10 with it.
        padded = functools.partial(direct, padding=((1, 1), (1, 1)))
        on_cpu = lambda x, kernel: padded(x, kernel)[:, 1:-1, 1:-1]  # noqa: E731
    return by_platform(x, kernel, cpu=on_cpu, default=direct)


def in_one_type(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Returns images and a kernel in the type that they promote to.

    A kernel that is no array, but of a type that only a replacement of JAX's
    convolution knows, stays as it is.
    """
    if not isinstance(kernel, Array):
        return x, kernel
    dtype = jnp.result_type(x, kernel)
    return x.astype(dtype), kernel.astype(dtype)


def explicit_padding(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> Pads:
    """Returns `padding` as pairs of numbers, for an image of this size."""
    pads = padding_pairs(padding)
    if not isinstance(pads, str):
        return pads
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    top, left = lax.padtype_to_pads(image_size, spans, strides, pads)
    return (pair(top), pair(left))


def pad_image(x: Float[Array, "n h w c"], pads: Pads) -> Float[Array, "n hp wp c"]:
    """Pads with zeros; negative padding crops, which `jnp.pad` refuses."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), *((a, b, 0) for a, b in pads), (0, 0, 0)))


def _conv2d_as_product(
    x: Array,
    kernel: Array,
    *,
    strides: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
    precision: Any,
) -> Array:
    """Convolves by one matrix product over all taps side by side."""
    kh, kw, c_in, c_out = kernel.shape
    x = pad_image(x, pads)
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
    return _product(patches, kernel.reshape(-1, c_out), precision=precision)


def mix_channels(
    x: Float[Array, "*batch c_in"],
    matrix: Float[Array, "c_in c_out"],
    *,
    precision: Any = None,
    on_tpu: MixingForm = "convolution",
) -> Float[Array, "*batch c_out"]:
    """Multiplies the channels at every place with a matrix.

    It is a product of matrices; on a TPU, that of images [n, h, w, c] is what `on_tpu`
    says.
    """
    if is_spread_explicitly(x):
        return jnp.einsum("...i,io->...o", x, matrix, precision=precision)
    multiply = functools.partial(_product, precision=precision)
    if x.ndim != 4 or on_tpu == "product":
        return multiply(x, matrix)

    def convolve(x: Array, matrix: Array) -> Array:
        # Where a product of matrices stands between convolutions, XLA for TPU lays the
        # images out anew: it estimates 0.23 million cycles on v5e for [256,16,16,128]
        # with Tucker-2 factors of rank 64, and 0.17 for three convolutions.
        kernel = matrix.reshape(1, 1, *matrix.shape)
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )

    return by_platform(*in_one_type(x, matrix), tpu=convolve, default=multiply)


def _product(x: Array, matrix: Array, *, precision: Any) -> Array:
    # With einsum, XLA on CPU would transpose all images for the matrix's gradient, and
    # compute whole blocks a second time to do so: a step of ResNet18 with Tucker-2
    # factors takes 396 ms with it, and 310 with matmul.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision=precision)
    return y.reshape(*x.shape[:-1], matrix.shape[1])


def is_spread_explicitly(x: Array) -> bool:
    """Whether `x` lies on a mesh of explicit axes, which cannot be cut or merged."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)
