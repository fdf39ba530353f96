"""Pairs of images mixed, and parts of images erased: pure functions by given numbers.

References:
    Zhang et al., 2018, https://arxiv.org/abs/1710.09412 (mixup)
    Yun et al., 2019, https://arxiv.org/abs/1905.04899 (CutMix)
    Zhong et al., 2020, https://arxiv.org/abs/1708.04896 (random erasing)
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from inertia_jax.ops.precision import at_least_float32


def draw_weights(keys: Key[Array, "n"], *, alpha: float) -> Float[Array, "n"]:
    """Draws the weight of each image beside its partner's, from Beta(alpha, alpha)."""
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


def mixup(
    images: Float[Array, "n h w c"],
    partners: Float[Array, "n h w c"],
    weights: Float[Array, "n"],
) -> Float[Array, "n h w c"]:
    """Returns `weight * image + (1 - weight) * partner`, in float32 at least."""
    dtype = at_least_float32(images.dtype)
    share = weights.astype(dtype)[:, None, None, None]
    mixed = share * images.astype(dtype) + (1 - share) * partners.astype(dtype)
    return mixed.astype(images.dtype)


def draw_patches(
    keys: Key[Array, "n"], weights: Float[Array, "n"], *, shape: tuple[int, ...]
) -> Int[Array, "n 4"]:
    """Draws top, left, bottom and right of a patch of `1 - weight` of each image.

    Its middle is anywhere in the image, and what lies outside is cut off.
    """
    sides = jnp.array(shape)

    def one(key: Array, weight: Array) -> Array:
        middle = jax.random.randint(key, (2,), 0, sides)
        half = jnp.floor(jnp.sqrt(1 - weight) / 2 * sides).astype(jnp.int32)
        first = jnp.maximum(middle - half, 0)
        return jnp.concatenate([first, jnp.minimum(middle + half, sides)])

    return jax.vmap(one)(keys, weights)


def inside(boxes: Int[Array, "n 4"], *, shape: tuple[int, ...]) -> Bool[Array, "n h w"]:
    """Returns which pixels lie in boxes of top, left, bottom and right."""
    rows = jnp.arange(shape[0])[None, :, None]
    columns = jnp.arange(shape[1])[None, None, :]
    top, left, bottom, right = (boxes[:, i, None, None] for i in range(4))
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def cutmix(
    images: Float[Array, "n h w c"],
    partners: Float[Array, "n h w c"],
    boxes: Int[Array, "n 4"],
) -> tuple[Float[Array, "n h w c"], Float[Array, "n"]]:
    """Returns images with their partners' pixels in boxes, and the share that is left.

    The boxes are top, left, bottom and right.
    """
    pasted = inside(boxes, shape=images.shape[1:3])
    mixed = jnp.where(pasted[..., None], partners, images)
    return mixed, 1 - pasted.mean((1, 2), dtype=jnp.float32)


def draw_erased(
    keys: Key[Array, "n"], *, shape: tuple[int, ...], probability: float
) -> Int[Array, "n 4"]:
    """Draws top, left, bottom and right of what is erased of each image.

    That is, with `probability`, a box of 2% to 33% of the area, 0.3 to 3.3 times as
    high as wide; in the others, nothing. torchvision's RandomErasing draws up to ten
    times until a box fits. Here ten are drawn at once, and the first that fits is
    taken; if none fits, nothing is erased.
    """
    height, width = shape
    whole = jnp.array(shape, jnp.float32)

    def one(key: Array) -> Array:
        coin_key, area_key, ratio_key, corner_key = jax.random.split(key, 4)
        areas = jax.random.uniform(area_key, (10,), minval=0.02, maxval=0.33)
        areas = areas * height * width
        low, high = jnp.log(jnp.array([0.3, 3.3]))
        ratios = jnp.exp(jax.random.uniform(ratio_key, (10,), minval=low, maxval=high))
        sides = jnp.round(
            jnp.stack([jnp.sqrt(areas * ratios), jnp.sqrt(areas / ratios)], axis=-1)
        )
        fits = jnp.all((sides > 0) & (sides < whole[None]), axis=-1)
        chosen = sides[jnp.argmax(fits)]
        corner = jnp.floor(jax.random.uniform(corner_key, (2,)) * (whole - chosen + 1))
        box = jnp.concatenate([corner, corner + chosen]).astype(jnp.int32)
        is_erased = jax.random.bernoulli(coin_key, probability) & jnp.any(fits)
        return jnp.where(is_erased, box, jnp.zeros_like(box))

    return jax.vmap(one)(keys)


def erase(
    images: Float[Array, "n h w c"], boxes: Int[Array, "n 4"]
) -> Float[Array, "n h w c"]:
    """Sets the pixels in boxes to 0, which is the mean of normalised images."""
    erased = inside(boxes, shape=images.shape[1:3])
    return jnp.where(erased[..., None], jnp.zeros_like(images), images)
