"""Augmentation on the device: pure functions of images and drawn numbers.

Each example's random numbers are drawn from its own key, so that they do not depend on
how a batch is split over devices. Images stay uint8 until they are resized or
normalised.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key, Num, UInt8

from inertia_jax.images import normalise, preprocess, resized, scale_and_cut
from inertia_jax.metadata import Preprocessing
from train.config import Data
from train.data.mixing import (
    cutmix,
    draw_erased,
    draw_patches,
    draw_weights,
    erase,
    mixup,
)
from train.data.randaugment import rand_augment


def example_keys(key: Key[Array, ""], positions: Int[Array, "n"]) -> Key[Array, "n"]:
    """Returns a key for each example, made from its position in the global batch."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)


def crop(
    images: Num[Array, "n h w c"],
    offsets: Int[Array, "n 2"],
    *,
    padding: int,
    mode: Literal["zeros", "reflect"] = "zeros",
) -> Num[Array, "n h w c"]:
    """Surrounds images with `padding` pixels and cuts their own size out at `offsets`.

    The offsets are top and left in the padded image, in [0, 2 padding]. The padding is
    zeros, or the image mirrored at its edges, which are not repeated.
    """
    sides = (padding, padding)
    widths = ((0, 0), sides, sides, (0, 0))
    padded = jnp.pad(images, widths, "reflect" if mode == "reflect" else "constant")
    shape = images.shape[1:]

    def cut(image: Array, offset: Array) -> Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)

    return jax.vmap(cut)(padded, offsets)


def flip(
    images: Num[Array, "n h w c"], mirrored: Bool[Array, "n"]
) -> Num[Array, "n h w c"]:
    """Mirrors images left to right where `mirrored` is true."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def alternating_mirrors(
    images: UInt8[Array, "n h w c"], epoch: Int[Array, ""], *, key: Key[Array, ""]
) -> Bool[Array, "n"]:
    """Returns which images are mirrored: drawn in epoch 0, then alternating.

    In any two consecutive epochs, an image is seen both ways. Its side in epoch 0 is
    the top bit of `sum_i weight_i pixel_i mod 2^32` with random weights: a coin for
    each image, which does not depend on the image's place in a batch or chunk. Equal
    images share their coin. The images are those that are stored, and the key is the
    same in every epoch.

    References:
        Jordan, 2024, https://arxiv.org/abs/2404.00498, alternating flip
    """
    weights = jax.random.bits(key, images.shape[1:], jnp.uint32)
    products = images.astype(jnp.uint32) * weights[None]
    coins = products.sum((1, 2, 3), dtype=jnp.uint32) >> 31
    return (coins + epoch.astype(jnp.uint32)) % 2 == 1


def resized_crop(
    images: Num[Array, "n h w c"],
    boxes: Float[Array, "n 4"],
    *,
    output_shape: tuple[int, int],
) -> Float[Array, "n h_out w_out c"]:
    """Resizes a part of each image to `output_shape`, bilinear, antialiased.

    The boxes are top, left, height and width of each part, in pixels.
    """

    def one(image: Array, box: Array) -> Array:
        scale = jnp.array(output_shape) / box[2:]
        return scale_and_cut(
            image[None], scale, -box[:2] * scale, output_shape=output_shape
        )[0]

    return jax.vmap(one)(images, boxes)


def draw_boxes(
    keys: Key[Array, "n"], shape: tuple[int, int], *, output_shape: tuple[int, int]
) -> Float[Array, "n 4"]:
    """Draws parts of 8% to 100% of the area, of 3/4 to 4/3 of the output's shape.

    The shape is width over height. A part is thus stretched by at most 4/3, also where
    the output is not square.

    torchvision's RandomResizedCrop draws up to ten times until a part fits. Here ten
    parts are drawn at once, and the first that fits is taken. If none fits, both take
    the largest centred part of the image.
    """
    height, width = shape
    aspect = output_shape[1] / output_shape[0]

    def one(key: Array) -> Array:
        area_key, ratio_key, corner_key = jax.random.split(key, 3)
        area = height * width * jax.random.uniform(area_key, (10,), minval=0.08)
        log_ratio = jnp.log(4 / 3) * jax.random.uniform(ratio_key, (10,), minval=-1)
        sides = jnp.stack(
            [
                jnp.round(jnp.sqrt(area * jnp.exp(-log_ratio) / aspect)),
                jnp.round(jnp.sqrt(area * jnp.exp(log_ratio) * aspect)),
            ],
            axis=-1,
        )
        whole = jnp.array([height, width], jnp.float32)
        fits = jnp.all((sides > 0) & (sides <= whole[None]), axis=-1)
        first = jnp.argmax(fits)
        corner = jnp.floor(
            jax.random.uniform(corner_key, (2,)) * (whole - sides[first] + 1)
        )
        longest = whole[::-1] * 4 / 3 * jnp.array([1 / aspect, aspect])
        least = jnp.minimum(whole, jnp.round(longest))
        centred = jnp.concatenate([jnp.floor((whole - least) / 2), least])
        drawn = jnp.concatenate([corner, sides[first]])
        return jnp.where(jnp.any(fits), drawn, centred)

    return jax.vmap(one)(keys)


def _image_keys(keys: Key[Array, "n"]) -> list[Key[Array, "n"]]:
    """Returns a key of each image for each purpose, in this order.

    Crops, flips, RandAugment, random erasing, mixing. Append new purposes: the first n
    keys do not depend on how many are split.
    """
    split = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
    return [*jnp.unstack(split, axis=1)]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The processing of images before they enter the network.

    Attributes:
        preprocessing: The shape and normalisation of the input.
        data: The configuration, which says how training images are cropped and
            mirrored.
        dtype: The type of the result.
    """

    preprocessing: Preprocessing
    data: Data
    dtype: jnp.dtype

    @classmethod
    def plain(cls, preprocessing: Preprocessing, dtype: DTypeLike) -> "Augmentation":
        """Returns one that only resizes and normalises, also in training."""
        data = Data(crop_padding=0, flip=False)
        return cls(preprocessing, data, jnp.dtype(dtype))

    def for_training(
        self,
        images: UInt8[Array, "n h w c"],
        keys: Key[Array, "n"],
        mirrored: Bool[Array, "n"] | None = None,
    ) -> Float[Array, "n h_out w_out c"]:
        """Resizes, crops, mirrors and normalises; random, each image by its key.

        RandAugment comes before the normalisation, random erasing after it. `mirrored`
        says which images are mirrored if `flip` is on; None: the keys do.
        """
        data = self.data
        crop_keys, flip_keys, operation_keys, erasing_keys, _ = _image_keys(keys)
        output_shape = self.preprocessing.image_shape[:2]
        if data.resized_crop:
            height, width = images.shape[1:3]
            boxes = draw_boxes(crop_keys, (height, width), output_shape=output_shape)
            images = resized_crop(images, boxes, output_shape=output_shape)
        else:
            images = resized(images, output_shape, output_shape=output_shape)
            if data.crop_padding:
                high = 2 * data.crop_padding + 1
                draw = lambda key: jax.random.randint(key, (2,), 0, high)  # noqa: E731
                offsets = jax.vmap(draw)(crop_keys)
                images = crop(
                    images, offsets, padding=data.crop_padding, mode=data.crop_mode
                )
        if data.flip:
            if mirrored is None:
                mirrored = jax.vmap(jax.random.bernoulli)(flip_keys)
            images = flip(images, mirrored)
        if data.rand_augment:
            # Resized images are not whole numbers yet.
            images = rand_augment(
                jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8),
                operation_keys,
                num_operations=data.rand_augment,
                magnitude=data.rand_augment_magnitude,
            )
        mean, std = self.preprocessing.mean, self.preprocessing.std
        images = normalise(images, mean=mean, std=std, dtype=self.dtype)
        if data.random_erasing:
            boxes = draw_erased(
                erasing_keys,
                shape=images.shape[1:3],
                probability=data.random_erasing,
            )
            images = erase(images, boxes)
        return images

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed in training."""
        return bool(self.data.mixup or self.data.cutmix)

    def mixed(
        self,
        images: Float[Array, "n h w c"],
        partners: Float[Array, "n h w c"],
        keys: Key[Array, "n"],
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n"]]:
        """Mixes images with their partners, as `data` says, each by its key.

        Args:
            images: What `for_training` has returned.
            partners: As many of the same.
            keys: The keys that `for_training` was given.

        Returns:
            The mixed images, and the weight of each image's own label, in [0, 1].
        """
        *_, mixing_keys = _image_keys(keys)
        weight_keys, patch_keys, coin_keys = jnp.unstack(
            jax.vmap(lambda key: jax.random.split(key, 3))(mixing_keys), axis=1
        )
        found = []
        if alpha := self.data.mixup:
            weights = draw_weights(weight_keys, alpha=alpha)
            found.append((mixup(images, partners, weights), weights))
        if alpha := self.data.cutmix:
            weights = draw_weights(weight_keys, alpha=alpha)
            boxes = draw_patches(patch_keys, weights, shape=images.shape[1:3])
            found.append(cutmix(images, partners, boxes))
        if len(found) == 1:
            return found[0]
        (blended, blended_weights), (pasted, pasted_weights) = found
        coins = jax.vmap(jax.random.bernoulli)(coin_keys)
        return (
            jnp.where(coins[:, None, None, None], blended, pasted),
            jnp.where(coins, blended_weights, pasted_weights),
        )

    def for_evaluation(
        self, images: UInt8[Array, "n h w c"]
    ) -> Float[Array, "n h_out w_out c"]:
        """Resizes, cuts the centre out and normalises."""
        return preprocess(images, self.preprocessing, dtype=self.dtype)
