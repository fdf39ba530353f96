"""Convolution as layers apply it: on CPU, each of its parts in the quickest form.

On CPU, the convolution and, in training, both of its gradients take Winograd's form
where it is quicker. Where it is not, columns of few features are joined, the kernel's
gradient is matrix products, the gradient of a strided convolution's images is one
convolution of unit stride per phase, and the rest is XLA's. On other platforms
everything is XLA's. The window reading of inertial convolutions and the gradients of
the tiled reading take XLA's forms on every platform, since both promise forward mode in
training as well.

XLA's forms also serve images of symbolic sides and, but for joined columns, batches of
symbolic size, images on explicit meshes, and images of another type than the kernel.
Winograd's form and the products loop over images, so they gather a batch that one
program spreads over several CPU devices by itself (`jax.jit` over sharded arrays);
inside `jax.pmap` and `jax.shard_map` every device works on its own images.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from inertia_jax.ops.conv.any_axes import conv
from inertia_jax.ops.conv.columns import (
    columns_to_join,
    joined_columns_conv2d,
    joined_columns_input_gradient,
)
from inertia_jax.ops.conv.conv import (
    Pads,
    conv2d,
    explicit_padding,
    is_spread_explicitly,
    pair,
    stride_pair,
)
from inertia_jax.ops.conv.gradients import kernel_gradient, strided_input_gradient
from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.conv.replaced import is_replaced
from inertia_jax.ops.conv.winograd import (
    Planes,
    transform_filters,
    winograd_conv2d,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

# Winograd's form pays from this many channels, in and out, and this many tiles. As a
# share of XLA's time, on two cores with jax 0.10.2, it takes 0.98-1.55 for 32 channels,
# 0.78-0.80 for 48, 0.66-0.70 for 64, and 0.55-0.66 for 128; for 512 channels it takes
# 0.88 on 64 tiles, 1.07 on 16 tiles, and 2 on 4 tiles.
_LEAST_CHANNELS = 48
_LEAST_TILES = 64
# The share for a kernel's gradient is 0.74-0.92 at 96 channels, 1.17-1.35 at 64.
_LEAST_CHANNELS_OF_KERNEL_GRADIENT = 96
# Filters that may turn out not to be needed are transformed from this many tiles on.
_LEAST_TILES_TO_PREPARE = 1024
# Up to this many phases, images' gradients are one convolution per phase; each must be
# compiled. At stride 2 they take 0.3 to 0.9 of XLA's time.
_MOST_PHASES = 4


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def conv2d_to_apply(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    strides: tuple[int, int],
    padding: Pads,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves as `conv2d` does, in the quickest form on CPU, for networks in use.

    Its derivatives, in forward and reverse mode, are those of `conv2d`.
    """
    return _quickest(x, kernel, strides, padding)


@functools.partial(conv2d_to_apply.defjvp, symbolic_zeros=True)
def _conv2d_to_apply_jvp(
    strides: tuple[int, int],
    padding: Pads,
    primals: tuple[Array, Array],
    tangents: tuple[Any, Any],
) -> tuple[Array, Any]:
    x, kernel = primals
    x_dot, kernel_dot = tangents
    convolve = functools.partial(conv2d, strides=strides, padding=padding)
    y = conv2d_to_apply(x, kernel, strides, padding)
    parts = []
    if type(x_dot) is not SymbolicZero:
        parts.append(convolve(x_dot, kernel))
    if type(kernel_dot) is not SymbolicZero:
        parts.append(convolve(x, kernel_dot))
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d_to_train(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    strides: tuple[int, int],
    padding: Pads,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves as `conv2d` does, on CPU in the quickest form, also of its gradients.

    Like every `jax.custom_vjp` it has no forward mode (`jax.jvp`), but its reverse-mode
    gradient has one.
    """
    return _quickest(x, kernel, strides, padding)


def _forward(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return _quickest(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: tuple[int, int],
    padding: Pads,
    residuals: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    x, kernel = residuals
    convolve = functools.partial(conv2d, strides=strides, padding=padding)

    def input_by_xla(cotangent: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: convolve(x, kernel), x)(cotangent)[0]

    def kernel_by_xla(x: Array, cotangent: Array) -> Array:
        transpose = jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)
        return transpose(cotangent)[0]

    if not _may_be_cut(x, kernel):
        return input_by_xla(cotangent, kernel), kernel_by_xla(x, cotangent)
    pays = functools.partial(
        _winograd_pays, x, kernel, strides, padding, tiles=_LEAST_TILES
    )
    if pays(channels=_LEAST_CHANNELS_OF_KERNEL_GRADIENT):
        kernel_on_cpu = functools.partial(winograd_kernel_gradient, padding=padding)
    else:
        # By itself XLA's form can be quicker (7.7 ms, not 8.7, at [64,8,8,256] to 512
        # with stride 2), but in a network XLA computes whole blocks again for it.
        kernel_on_cpu = functools.partial(
            kernel_gradient,
            kernel_size=(kernel.shape[0], kernel.shape[1]),
            strides=strides,
            padding=padding,
        )
    input_on_cpu: Callable[[Array, Array], Array] | None = None
    if pays(channels=_LEAST_CHANNELS):
        input_on_cpu = functools.partial(winograd_input_gradient, padding=padding)
    elif strides == (1, 1):
        columns = _columns(cotangent, kernel, x.shape[1:], strides)
        if columns > 1:
            input_on_cpu = functools.partial(
                joined_columns_input_gradient, padding=padding, columns=columns
            )
    elif math.prod(strides) <= _MOST_PHASES and kernel.shape[:2] != (1, 1):
        input_on_cpu = functools.partial(
            strided_input_gradient,
            input_size=(x.shape[1], x.shape[2]),
            strides=strides,
            padding=padding,
        )
    return (
        by_platform(cotangent, kernel, cpu=input_on_cpu, default=input_by_xla),
        by_platform(x, cotangent, cpu=kernel_on_cpu, default=kernel_by_xla),
    )


conv2d_to_train.defvjp(_forward, _backward)


def _quickest(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Pads
) -> Array:
    convolve = functools.partial(conv2d, strides=strides, padding=padding)
    on_cpu = None
    pays = functools.partial(_winograd_pays, x, kernel, strides, padding)
    if pays(channels=_LEAST_CHANNELS, tiles=_LEAST_TILES):
        on_cpu = functools.partial(winograd_conv2d, padding=padding)
    elif all(isinstance(side, int) for side in x.shape[1:3]):
        shape = *_out_size(x, kernel, strides, padding), kernel.shape[3]
        columns = _columns(x, kernel, shape, strides)
        if columns > 1:
            on_cpu = functools.partial(
                joined_columns_conv2d, strides=strides, padding=padding, columns=columns
            )
    return by_platform(x, kernel, cpu=on_cpu, default=convolve)


def filters_for_cpu(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    padding: Pads,
) -> Planes | None:
    """Returns Winograd's filters, to convolve all images at stride 1 a few at a time.

    Where that is not quicker on CPU, it returns None.
    """
    pays = functools.partial(_winograd_pays, x, kernel, (1, 1), padding)
    if not pays(channels=_LEAST_CHANNELS, tiles=_LEAST_TILES_TO_PREPARE):
        return None
    return transform_filters(kernel)


def _winograd_pays(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Pads,
    *,
    channels: int,
    tiles: int,
) -> bool:
    """Whether Winograd's form is quicker on CPU, given the least channels and tiles."""
    n = x.shape[0]
    if not _may_be_cut(x, kernel) or kernel.shape[:2] != (3, 3) or strides != (1, 1):
        return False
    if x.dtype not in (jnp.float32, jnp.float64) or min(kernel.shape[2:]) < channels:
        return False
    height, width = _out_size(x, kernel, strides, padding)
    return n * -(-height // 2) * -(-width // 2) >= tiles


def _columns(
    x: Array, kernel: Array, shape: Sequence[int], strides: tuple[int, int]
) -> int:
    """Returns how many columns of an output of [height, width, c] to join on CPU."""
    *size, features = shape
    is_float32 = x.dtype == kernel.dtype == jnp.float32
    # Of an empty map, the shape does not follow from that of the gradient.
    if not is_float32 or is_spread_explicitly(x) or 0 in x.shape:
        return 1
    # The number of images may be a symbol.
    n = x.shape[0] if isinstance(x.shape[0], int) else 1
    return columns_to_join(
        (n, *size), (x.shape[3], features), side=kernel.shape[1], stride=strides[1]
    )


def _out_size(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Pads
) -> tuple[int, int]:
    """Returns the height and width of a convolution's output."""
    height, width = (
        max(0, (size + sum(around) - side) // step + 1)
        for size, side, step, around in zip(
            x.shape[1:3], kernel.shape[:2], strides, padding, strict=True
        )
    )
    return height, width


def _may_be_cut(x: Array, kernel: Array) -> bool:
    """Whether images can be cut into chunks, and have the kernel's type."""
    # In a program that is exported for any batch size, the size is a symbol.
    has_numbers = all(isinstance(size, int) for size in x.shape)
    return has_numbers and not is_spread_explicitly(x) and x.dtype == kernel.dtype


def conv_for_linen(
    lhs: Array,
    rhs: Any,
    window_strides: Sequence[int],
    padding: Any,
    *,
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    precision: Any = None,
    train: bool = False,
    **options: Any,
) -> Array:
    """Convolves, as the function that `nn.Conv` takes.

    With `train`, only reverse mode is differentiable. Images of another number of axes
    than two are XLA's.
    """
    if is_replaced():
        # The kernel may be of a type that only the replacement knows.
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            rhs_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            precision=precision,
            **options,
        )
    if lhs.ndim != 4:
        return conv(
            lhs,
            rhs,
            strides=window_strides,
            padding=padding,
            dilation=rhs_dilation,
            groups=feature_group_count,
            precision=precision,
        )
    strides = stride_pair(window_strides)
    taps = pair(rhs_dilation, "dilation", least=1)
    if feature_group_count != 1 or taps != (1, 1) or precision is not None:
        return conv2d(
            lhs,
            rhs,
            strides=strides,
            padding=padding,
            dilation=taps,
            groups=feature_group_count,
            precision=precision,
        )
    pads = explicit_padding(lhs.shape[1:3], rhs.shape[:2], strides, padding, taps)
    convolve = conv2d_to_train if train else conv2d_to_apply
    return convolve(lhs, rhs, strides, pads)
