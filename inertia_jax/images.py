"""Images as a network takes them: resized, their centre cut out, normalised."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Num, UInt8

from inertia_jax.metadata import Preprocessing
from inertia_jax.ops.precision import at_least_float32


def preprocess(
    images: UInt8[Array | np.ndarray, "n h w c"],
    preprocessing: Preprocessing,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "n h_out w_out c"]:
    """Returns images as a network takes them, exactly as its evaluation makes them.

    They are resized to cover `preprocessing.resized_sides`, bilinear and antialiased,
    their shape kept; the centre is cut out; and `(pixels / 255 - mean) / std`. Images
    that have the sides of the input, with no other `resize`, are normalised alone.

    The function is pure: `jax.jit` takes it, with `preprocessing` and `dtype` static.

    Args:
        images: Images of one size, of 0 to 255.
        preprocessing: The shape of the input, and its mean and deviation, as the
            metadata of a checkpoint have it.
        dtype: The type of the result; it is computed in float32 at least.

    Raises:
        ValueError: The images are not uint8, or have not four axes, or not the
            channels of the input.

    Example:
        >>> photographs = np.zeros((2, 48, 64, 1), np.uint8)
        >>> preprocessing = ij.Preprocessing((28, 28, 1), mean=(0.13,), std=(0.31,))
        >>> model.apply(variables, ij.preprocess(photographs, preprocessing)).shape
        (2, 10)
    """
    height, width, channels = preprocessing.image_shape
    if images.dtype != jnp.uint8:
        raise ValueError(f"`images` have type {images.dtype}; must be uint8.")
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"`images` have shape {images.shape}; must be [n, h, w, {channels}]."
        )
    batch = resized(
        jnp.asarray(images), preprocessing.resized_sides, output_shape=(height, width)
    )
    mean, std = preprocessing.mean, preprocessing.std
    return normalise(batch, mean=mean, std=std, dtype=jnp.dtype(dtype))


def resized(
    images: Num[Array, "n h w c"],
    sides: tuple[int, int],
    *,
    output_shape: tuple[int, int],
) -> Num[Array, "n h_out w_out c"]:
    """Returns what `resize` does, or the images themselves where they fit already."""
    if images.shape[1:3] == sides == output_shape:
        return images
    return resize(images, sides=sides, output_shape=output_shape)


def covering_size(stored: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of an image that covers two sides, its shape kept.

    The image is scaled by `max(h / h_stored, w / w_stored)`. The side that is not
    exact is rounded down to a pixel, as in torchvision.

    Args:
        stored: Height and width of the image.
        sides: Height and width to cover.
    """
    (height, width), (least_height, least_width) = stored, sides
    if least_height * width >= least_width * height:
        return least_height, width * least_height // height
    return height * least_width // width, least_width


def resize(
    images: Num[Array, "n h w c"],
    *,
    sides: tuple[int, int],
    output_shape: tuple[int, int],
) -> Float[Array, "n h_out w_out c"]:
    """Resizes to cover `sides`, bilinear, antialiased, and cuts the centre out."""
    # Sizes are static. torchvision rounds the corner to a pixel.
    stored = images.shape[1:3]
    covering = np.array(covering_size((stored[0], stored[1]), sides))
    corner = np.round((covering - np.array(output_shape)) / 2)
    scale = jnp.array(covering / np.array(stored), jnp.float32)
    return scale_and_cut(
        images, scale, jnp.array(-corner, jnp.float32), output_shape=output_shape
    )


def scale_and_cut(
    images: Num[Array, "n h w c"],
    scale: Float[Array, "2"],
    translation: Float[Array, "2"],
    *,
    output_shape: tuple[int, int],
) -> Float[Array, "n h_out w_out c"]:
    """Scales both sides, bilinear, antialiased, and moves the result, in pixels."""
    return jax.image.scale_and_translate(
        images.astype(jnp.float32),
        (images.shape[0], *output_shape, images.shape[-1]),
        (1, 2),
        scale,
        translation,
        method="linear",
        antialias=True,
    )


def normalise(
    images: Num[Array, "n h w c"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: jnp.dtype,
) -> Float[Array, "n h w c"]:
    """Returns `(images / 255 - mean) / std`, computed in float32 at least."""
    compute = at_least_float32(dtype)
    pixels = images.astype(compute) / 255
    offset, scale = jnp.array(mean, compute), jnp.array(std, compute)
    return ((pixels - offset[None, None, None]) / scale[None, None, None]).astype(dtype)
