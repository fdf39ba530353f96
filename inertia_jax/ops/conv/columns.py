"""Convolutions to few features, with neighbouring columns joined to one, for CPU.

XLA's convolution copies the pixels that each output depends on, and multiplies them by
the kernel. With few features the copies take longer than the products, whose vectors
are partly empty. Here neighbouring outputs of a row are the features of one output of a
wider kernel, which holds the taps once for each of them, shifted, and zeros elsewhere:

    Y[p, q c + t] = sum over i, j of x[p + i, q c + j] K[i, j - t],    t = 0..c-1

for c columns at unit stride, over c - 1 more taps. Copies become fewer, products more;
outputs lie in memory as before, and each is the same sum, of which further terms are 0.
Where a pixel is not finite, an output that does not depend on it may be NaN, if it is
joined to one that does.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.conv.conv import Pads

# Features of an output, times the growth of the kernel, up to which columns are joined:
# the numbers of float32 in a vector. For 64 images of 32 x 32 and 16 x 16 and 3x3
# kernels, on two cores, joined columns take this share of XLA's time: 0.2-0.4 from 8
# channels to 4 features, 0.4-0.6 from 5 to 7 and 6 to 8, 0.5-0.65 from 16 to 8, 0.6-0.9
# from 10 and 12 to 12, and at stride 2 0.7-0.8 from 8 to 8. That is with jax 0.12.0,
# and with 0.10.2 whether YNNPACK convolves there or not. More features gain in some of
# the three and lose in others: 0.8, 1.3 and 0.9-1.8 from 16 to 16.
_MOST_FEATURES = 16
# Channels and features together: from 24 to 8 it is 0.65, 1.1 and 1.1.
_MOST_CHANNELS = 24
# From 3 channels to 12 features YNNPACK takes four times as long for joined columns.
_LEAST_CHANNELS = 4
# So few features are those of four columns; others of two.
_FEATURES_OF_FOUR = 4
# Kernels of fewer columns would be mostly zeros.
_LEAST_SIDE = 3
# Narrower maps, and fewer outputs, gain nothing.
_LEAST_WIDTH = 8
_LEAST_OUTPUTS = 256


def columns_to_join(
    size: Sequence[int], channels: Sequence[int], *, side: int, stride: int = 1
) -> int:
    """Returns how many columns to join on CPU; 1: the convolution is quicker as it is.

    Args:
        size: Images, height and width of the output, in float32.
        channels: Channels of the images, and features of the output.
        side: Columns of the kernel.
        stride: Distance between columns of the output, in pixels.
    """
    width, (c_in, features) = size[2], channels
    is_large = width >= _LEAST_WIDTH and math.prod(size) >= _LEAST_OUTPUTS
    is_narrow = c_in >= _LEAST_CHANNELS and c_in + features <= _MOST_CHANNELS
    columns = 4 if features <= _FEATURES_OF_FOUR else 2
    if not is_large or not is_narrow or side < _LEAST_SIDE or width % columns:
        return 1
    growth = 1 + (columns - 1) * stride / side
    return columns if 0 < features * growth <= _MOST_FEATURES else 1


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
        wide.reshape(*wide.shape[:3], columns * kernel.shape[3]),
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
