"""Convolutions to few features, with neighbouring columns joined to one, for CPU.

XLA's convolution copies the pixels that each output depends on, and multiplies them by
the kernel. With few features the copies take longer than the products, whose vectors
are partly empty. Here neighbouring outputs of a row are the features of one output of a
wider kernel, which holds the taps once for each of them, shifted, and zeros elsewhere:

    Y[p, q c + t] = sum over i, j of x[p + i, q c + j] K[i, j - t],    t = 0..c-1

for c columns at unit stride, over c - 1 more taps. Copies become fewer, products more;
outputs lie in memory as before, and each is the same sum, of which further terms are 0.
A pixel that is not finite makes those columns NaN that are joined to one which it
belongs to.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.conv.conv import Pads

# Bytes of an output's features, times the growth of the kernel, up to which two columns
# are joined. Joined, as a share of XLA's time, on two cores with jax 0.10.2, 64 images
# of 32 x 32 to 8 x 8 pixels and 3x3 kernels take 0.4-0.7 for 8 features, 0.6-0.75 for
# 12, 0.8-0.87 for 16, 0.78-0.95 for 24, but 1.3-1.4 for 32; with stride 2 0.75 for 8,
# 0.9 for 12 and 1.1-1.25 for 24; 5x5 kernels 0.6-0.8 for 6 to 16 features.
_MOST_BYTES = 128
# Where images have so few channels, XLA copies number by number: 0.63-0.87 for 1 to 8
# channels and 32 or 64 features.
_FEW_CHANNELS = 8
_MOST_BYTES_OF_FEW_CHANNELS = 352
# Up to so many bytes, four are: 0.22-0.3 for 4 features, where two take 0.3-0.5.
_MOST_BYTES_OF_FOUR = 16
# Kernels of fewer columns would be mostly zeros.
_LEAST_SIDE = 3
# Narrower maps, and fewer outputs, gain nothing.
_LEAST_WIDTH = 8
_LEAST_OUTPUTS = 256


def columns_to_join(
    size: Sequence[int],
    channels: Sequence[int],
    *,
    bytes_each: int,
    side: int,
    stride: int = 1,
) -> int:
    """Returns how many columns to join on CPU; 1: the convolution is quicker as it is.

    Args:
        size: Images, height and width of the output.
        channels: Channels of the images, and features of the output.
        bytes_each: Bytes of a number.
        side: Columns of the kernel.
        stride: Distance between columns of the output, in pixels.
    """
    width, (c_in, features) = size[2], channels
    is_large = width >= _LEAST_WIDTH and math.prod(size) >= _LEAST_OUTPUTS
    columns = 4 if features * bytes_each <= _MOST_BYTES_OF_FOUR else 2
    if not is_large or side < max(_LEAST_SIDE, stride) or width % columns:
        return 1
    growth = 1 + stride / side  # of a kernel for two columns
    most = _MOST_BYTES if c_in > _FEW_CHANNELS else _MOST_BYTES_OF_FEW_CHANNELS
    return columns if features * bytes_each * growth <= most else 1


def joined_columns_conv2d(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    strides: tuple[int, int],
    padding: Pads,
    columns: int,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves as `conv2d` does, with columns joined.

    The output's width is a multiple of `columns`; kernel and images are of one type.
    """
    vertical, horizontal = strides
    shifts = range(0, columns * horizontal, horizontal)
    around = [((0, 0), (t, shifts[-1] - t), (0, 0), (0, 0)) for t in shifts]
    wide = jnp.stack([jnp.pad(kernel, pads) for pads in around], axis=3)
    y = lax.conv_general_dilated(
        x,
        wide.reshape(*wide.shape[:3], -1),
        (vertical, columns * horizontal),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    n, height, width, _ = y.shape
    return y.reshape(n, height, width * columns, kernel.shape[3])


def joined_columns_input_gradient(
    cotangent: Float[Array, "n h_out w_out c_out"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    padding: Pads,
    columns: int,
) -> Float[Array, "n h w c_in"]:
    """Returns the gradient of the images of a convolution of unit stride.

    It is the convolution of the outputs' gradient with the kernel turned by 180
    degrees, with columns joined.
    """
    kh, kw = kernel.shape[:2]
    (top, bottom), (left, right) = padding
    return joined_columns_conv2d(
        cotangent,
        kernel[::-1, ::-1].swapaxes(2, 3),
        strides=(1, 1),
        padding=((kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right)),
        columns=columns,
    )
