"""Mean and deviation of a set's pixels, beside those that it is normalised with."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from train.data.sets import ImageSet
from train.data.split import Split
from train.machine.processes import warn

# Images that are measured: enough for two digits.
_IMAGES = 256


def pixel_statistics(
    split: Split,
) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "c"]]:
    """Returns mean and deviation of each channel, of pixels in [0, 1].

    They are those of a few hundred images, evenly spaced over the split.
    """
    chosen = np.linspace(0, len(split) - 1, min(_IMAGES, len(split))).astype(int)
    images = np.asarray(split.images[chosen])
    counts = np.stack(
        [np.bincount(channel.ravel(), minlength=256) for channel in images.T], axis=1
    )
    shares, values = counts / counts.sum(0), np.arange(256)[:, None] / 255
    mean = (shares * values).sum(0)
    return mean, np.sqrt((shares * (values - mean) ** 2).sum(0))


def warn_of_normalisation(
    data: ImageSet, mean: Sequence[float], std: Sequence[float], *, whose: str
) -> None:
    """Warns on standard error where training images clearly have other statistics.

    That is a mean further than half a deviation from 0 after the normalisation, or a
    deviation outside [2/3, 3/2]. Sets of natural images lie within these.

    Args:
        data: The images.
        mean: The mean of each channel that they are normalised with.
        std: The deviation of each channel that they are normalised with.
        whose: What has this mean and deviation, in words.
    """
    if data.train is None or jax.process_index() != 0:
        return
    means, deviations = pixel_statistics(data.train)
    offsets = np.abs(means - mean) / np.asarray(std)
    ratios = deviations / np.asarray(std)
    if offsets.max() <= 0.5 and ratios.min() >= 2 / 3 and ratios.max() <= 3 / 2:
        return
    found = (tuple(np.round(v, 3).tolist()) for v in (means, deviations))
    warn(
        "the training images of {} have mean {} and deviation {}, of pixels in "
        "[0, 1]; {} has {} and {}.".format(
            data.name, *found, whose, tuple(mean), tuple(std)
        )
    )
