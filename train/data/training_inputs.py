"""Training images as a network sees them, for calibration and recalibration."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from train.data import Split
from train.data.augment import Augmentation, example_keys
from train.errors import UsageError


def training_inputs(
    split: Split, augmentation: Augmentation, count: int, *, seed: int
) -> np.ndarray:
    """Returns `count` training images as the network sees them in training.

    They are drawn without repetition; if there are fewer, all are taken. Where the
    training mixes images, each is mixed with another one of these. `seed` is that of
    the draw and of the augmentation.

    Raises:
        UsageError: `count` is below 2.
    """
    if count < 2:
        raise UsageError(
            f"the number of images to calibrate on (={count}) must be >= 2."
        )
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]

    @jax.jit
    def draw(images: Array, keys: Array) -> Array:
        batch = augmentation.for_training(images, keys)
        if augmentation.mixes:
            batch, _ = augmentation.mixed(batch, jnp.roll(batch, 1, axis=0), keys)
        return batch

    keys = example_keys(jax.random.key(seed), jnp.arange(len(chosen)))
    # Images are read in the order of the file and used in that of the draw: many sets
    # are stored class by class.
    places = np.sort(chosen)
    images = np.asarray(split.images[places])[np.searchsorted(places, chosen)]
    return np.concatenate(
        [
            np.asarray(draw(images[i : i + 256], keys[i : i + 256]))
            for i in range(0, len(images), 256)
        ]
    )
