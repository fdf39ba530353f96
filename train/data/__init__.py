"""Image sets by source: `tfds:NAME`, `imagefolder:PATH`, `npz:PATH` or `digits`."""

from typing import Any

from inertia_jax.atomic import local_path
from inertia_jax.metadata import both_sides
from train.config import Data
from train.data.digits import load_digits
from train.data.held_out import NOTHING, HeldOut
from train.data.imagefolder import load_imagefolder
from train.data.npz import load_npz
from train.data.sets import ImageSet, warn_of_other_names
from train.data.split import Split
from train.data.tfds import load_tfds
from train.errors import UsageError, shortened, user_input
from train.machine.processes import say
from train.sources import KINDS, complete_source, describe_near

__all__ = ["ImageSet", "Split", "load_configured", "load_data", "warn_of_other_names"]


def load_data(
    source: str,
    *,
    cache_dir: str,
    image_size: int | tuple[int, int] | None,
    how_to_resize: str = "set `data.image_size` to have them resized",
    for_training: bool = False,
    held_out: HeldOut = NOTHING,
) -> ImageSet:
    """Loads a set, checked.

    Args:
        source: `tfds:NAME`, `imagefolder:PATH`, `npz:PATH` or `digits`; a kind that is
            plain may be left out.
        cache_dir: The directory in which decoded sets are kept.
        image_size: Height and width to which image folders, and images of several
            sizes, are brought; one number is both.
        how_to_resize: The advice of the error of images of several sizes, without
            `image_size`.
        for_training: Whether a folder of one class is refused whose folders look like
            the classes.
        held_out: What is held out of the training images.

    Raises:
        UsageError: An unknown source, missing data, or images or labels that break a
            rule.
    """
    source = complete_source(source)
    kind, _, rest = source.partition(":")
    if source == "digits" or (kind in KINDS and rest):
        say(f"reading {source}")
    with user_input():
        for path in (cache_dir, rest):
            _check_place(path)
        options: Any = {
            "cache_dir": cache_dir,
            "sides": None if image_size is None else both_sides(image_size),
            "how_to_resize": how_to_resize,
            "held_out": held_out,
        }
        if source == "digits":
            return load_digits(held_out)
        if kind == "npz" and rest:
            return load_npz(rest, held_out)
        if kind == "imagefolder" and rest:
            return load_imagefolder(rest, for_training=for_training, **options)
        if kind == "tfds" and rest:
            return load_tfds(rest, **options)
    raise UsageError(
        f"the source of images (={shortened(source)}) must be tfds:NAME, "
        f"imagefolder:PATH, npz:PATH or digits.{describe_near(source)}"
    )


def _check_place(path: str) -> None:
    """Raises ValueError for a URL, and for the home of a user that there is not."""
    try:
        local_path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is in the home of a user that there is not."
        ) from error


def load_configured(data: Data) -> ImageSet:
    """Loads a configuration's set, as `load_data` does, to train on it.

    Raises:
        UsageError: As `load_data`, and where there is one class.
    """
    found = load_data(
        data.source,
        cache_dir=data.cache_dir,
        image_size=data.load_size,
        for_training=True,
        held_out=HeldOut.of(data),
    )
    if found.train is not None and found.num_classes < 2:
        raise UsageError(
            f"{found.name}: there is one class; training needs two or more."
        )
    return found
