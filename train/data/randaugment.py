"""RandAugment on the device: Pillow's operations as pure functions of one image.

An operation is a table of values, then a blend with another image, then a warp, of
which all but one leave the image as it is. Under `vmap`, where a branch would compute
all fourteen operations, each image thus costs one of each kind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, UInt8

# Those of torchvision's RandAugment, in its order.
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
# The highest magnitude.
MOST = 30


def rand_augment(
    images: UInt8[Array, "n h w c"],
    keys: Key[Array, "n"],
    *,
    num_operations: int,
    magnitude: int,
) -> UInt8[Array, "n h w c"]:
    """Changes each image by operations that are drawn by its key, one after another.

    Args:
        images: The images.
        keys: A key for each image.
        num_operations: The number of operations on an image.
        magnitude: Their magnitude, in [0, 30]; half of them go the other way.

    References:
        Cubuk et al., 2020, https://arxiv.org/abs/1909.13719; operations and magnitudes
        as in torchvision's `RandAugment`
    """

    def one(image: Array, key: Array) -> Array:
        for step_key in jax.random.split(key, num_operations):
            kind_key, sign_key = jax.random.split(step_key)
            operation = jax.random.randint(kind_key, (), 0, len(OPERATIONS))
            sign = jnp.where(jax.random.bernoulli(sign_key), -1, 1)
            image = operate(image, operation, sign, magnitude=magnitude)
        return image

    return jax.vmap(one)(images, keys)


def operate(
    image: UInt8[Array, "h w c"],
    operation: Int[Array, ""],
    sign: Int[Array, ""],
    *,
    magnitude: int,
) -> UInt8[Array, "h w c"]:
    """Applies one of `OPERATIONS`, in Pillow's arithmetic.

    Args:
        image: The image.
        operation: The operation, by its place.
        sign: 1, or -1 for the other way: left, up, clockwise, darker and so on.
        magnitude: The magnitude, in [0, 30].
    """
    level = magnitude / MOST

    def is_kind(name: str) -> Array:
        return operation == OPERATIONS.index(name)

    table = _table(image, is_kind, level)
    image = jax.vmap(jnp.take, in_axes=(0, 2), out_axes=2)(table, image)
    factor = jnp.where(sign > 0, 1 + 0.9 * level, 1 - 0.9 * level)
    image = _blend(image, is_kind, factor)
    return _warp(image, _coefficients(image.shape, is_kind, level, sign))


def _table(
    image: Array, is_kind: Callable[[str], Array], level: float
) -> UInt8[Array, "c 256"]:
    """Returns what becomes of each value of each channel."""
    values = jnp.arange(256)
    kept_bits = 8 - round(level * 4)
    mask = 256 - 2 ** (8 - kept_bits)
    threshold = 255 - 255 * level
    tables = {
        "posterize": values & mask,
        "solarize": jnp.where(values < threshold, values, 255 - values),
    }
    counts = jax.vmap(lambda c: jnp.bincount(c.ravel(), length=256), 2)(image)
    of_channels = {"autocontrast": _stretched, "equalize": _equalised}
    table = jnp.broadcast_to(values, counts.shape)
    for name, found in tables.items():
        table = jnp.where(is_kind(name), found[None], table)
    for name, function in of_channels.items():
        table = jnp.where(is_kind(name), jax.vmap(function)(counts), table)
    return table.astype(jnp.uint8)


def _stretched(counts: Int[Array, "256"]) -> Int[Array, "256"]:
    """Returns the table that stretches a channel's values to 0 to 255."""
    values = jnp.arange(256)
    low = jnp.argmax(counts > 0)
    high = 255 - jnp.argmax(counts[::-1] > 0)
    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), values)


def _equalised(counts: Int[Array, "256"]) -> Int[Array, "256"]:
    """Returns the table that makes a channel's values about equally frequent."""
    values = jnp.arange(256)
    last = counts[255 - jnp.argmax(counts[::-1] > 0)]
    step = (counts.sum() - last) // 255
    before = jnp.cumsum(counts) - counts
    equalised = (step // 2 + before) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(equalised, 255), values)


def _blend(image: Array, is_kind: Callable[[str], Array], factor: Array) -> Array:
    """Returns `other + factor (image - other)`, cut to whole values of 0 to 255."""
    grey = _grey(image)
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    others = {
        "brightness": jnp.zeros_like(image),
        "color": jnp.broadcast_to(grey[..., None], image.shape),
        "contrast": jnp.full(image.shape, mean, jnp.uint8),
        "sharpness": _smooth(image),
    }
    other = image
    for name, found in others.items():
        other = jnp.where(is_kind(name), found.astype(jnp.uint8), other)
    first, second = other.astype(jnp.float32), image.astype(jnp.float32)
    blended = first + factor.astype(jnp.float32) * (second - first)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def _grey(image: Array) -> Int[Array, "h w"]:
    """Returns the brightness of each pixel, by ITU-R 601-2, as Pillow rounds it."""
    if image.shape[-1] == 1:
        return image[..., 0].astype(jnp.int32)
    weights = jnp.array([19595, 38470, 7471])
    return ((image * weights[None, None]).sum(-1) + 2**15) >> 16


def _smooth(image: Array) -> Array:
    """Returns a mean over 3 x 3 pixels, the middle one counted five times.

    Pixels at the edges stay.
    """
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    wide = image.astype(jnp.int32)
    rows = [wide[top : top + height - 2] for top in range(3)]
    around = sum(r[:, left : left + width - 2] for r in rows for left in range(3))
    middle = (2 * (around + 4 * wide[1:-1, 1:-1]) + 13) // 26
    return image.at[1:-1, 1:-1].set(middle.astype(jnp.uint8))


def _coefficients(
    shape: tuple[int, ...], is_kind: Callable[[str], Array], level: float, sign: Array
) -> Float[Array, "6"]:
    """Returns the map from places of the result to places of the image."""
    height, width = shape[:2]
    shear = 0.3 * level * sign
    right, down = (
        jnp.trunc(150 / 331 * side * level * sign) for side in (width, height)
    )
    angle = jnp.deg2rad(-30.0 * level * sign)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    centre = (width / 2, height / 2)
    maps = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, -right, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -down),
        "rotate": (
            *(cos, sin, centre[0] - cos * centre[0] - sin * centre[1]),
            *(-sin, cos, centre[1] + sin * centre[0] - cos * centre[1]),
        ),
    }
    chosen = jnp.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    for name, found in maps.items():
        numbers = jnp.stack([jnp.asarray(n, jnp.float32) for n in found])
        chosen = jnp.where(is_kind(name), numbers, chosen)
    return chosen


def _warp(image: Array, coefficients: Float[Array, "6"]) -> Array:
    """Returns, at (x, y), the pixel at (a x + b y + c, d x + e y + f); outside, black.

    Places are those of the pixels' middles, in 1 / 65536 of a pixel, as in Pillow.
    """
    height, width, _ = image.shape
    fixed = lambda value: jnp.floor(value * 65536 + 0.5).astype(jnp.int32)  # noqa: E731
    a, b, c, d, e, f = coefficients
    x, y = jnp.arange(width)[None], jnp.arange(height)[:, None]
    column = (fixed(c + (a + b) / 2) + fixed(b) * y + fixed(a) * x) >> 16
    row = (fixed(f + (d + e) / 2) + fixed(e) * y + fixed(d) * x) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    found = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], found, jnp.zeros_like(found))
