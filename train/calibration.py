"""Training images as a network sees them, for calibration and recalibration."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from inertia_jax.metadata import Preprocessing
from train.augment import Augmentation, example_keys
from train.data import Split
from train.errors import UsageError


def training_inputs(
    split: Split,
    preprocessing: Preprocessing,
    count: int,
    *,
    seed: int,
    dtype: Any,
    crop_padding: int = 0,
    flip: bool = False,
    resized_crop: bool = False,
    crop_mode: Literal["zeros", "reflect"] = "zeros",
) -> np.ndarray:
    """Returns some training images as the network sees them, plain if not said.

    Args:
        split: The training images.
        preprocessing: Of the network.
        count: So many, drawn without repetition; all, if there are fewer.
        seed: Of the draw and of the augmentation.
        dtype: Of the network's computation.
        crop_padding: See `train.config.Data`.
        flip: Likewise.
        resized_crop: Likewise.
        crop_mode: Likewise.
    """
    if count < 2:
        raise UsageError(
            f"the number of images to calibrate on (={count}) must be >= 2."
        )
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]
    augmentation = Augmentation(
        preprocessing,
        crop_padding=crop_padding,
        flip=flip,
        resized_crop=resized_crop,
        dtype=jnp.dtype(dtype),
        crop_mode=crop_mode,
    )
    draw = jax.jit(augmentation.for_training)
    keys = example_keys(jax.random.key(seed), jnp.arange(len(chosen)))
    # Read in the order of the file, used in that of the draw: sets may lie by class.
    places = np.sort(chosen)
    images = np.asarray(split.images[places])[np.searchsorted(places, chosen)]
    return np.concatenate(
        [
            np.asarray(draw(images[i : i + 256], keys[i : i + 256]))
            for i in range(0, len(images), 256)
        ]
    )
