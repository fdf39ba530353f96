"""Training images that are held out: as test images, and for validation."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.config import Data
from train.data.split import Rows, Split
from train.data.stratify import stratified_split
from train.errors import UsageError

# The fields of `Data` that say what is held out.
HELD_OUT = ("test_share", "validation_share", "split_seed")

# What an error about images without a test split says of the way out.
HOW_TO_HOLD_OUT = (
    "a run with `--data.test-share 0.2` holds a share of the training images out as "
    "test images"
)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Shares of a source's training images that are never trained on.

    Attributes:
        test_share: The share that are test images, of a source without any.
        validation_share: The share that choose the best checkpoint.
        seed: The seed of the draw.
        is_optional: Whether a source may also have test images of its own.
    """

    test_share: float = 0.0
    validation_share: float = 0.0
    seed: int = 0
    is_optional: bool = False

    @classmethod
    def of(cls, data: Data) -> "HeldOut":
        """Returns what a configuration holds out."""
        return cls(data.test_share, data.validation_share, data.split_seed)


NOTHING = HeldOut()


def source_name(source: str) -> str:
    """Returns the name of a source without its place on this machine."""
    return pathlib.PurePath(source.partition(":")[2] or source).name


def as_trained(trained_on: Data | None, source: str) -> HeldOut:
    """Returns what a training held out of a source: nothing of another source.

    A source of the same name in another place may be another one: where it has test
    images, nothing was held out of it.
    """
    if trained_on is None or source_name(source) != source_name(trained_on.source):
        return NOTHING
    is_moved = _place(source) != _place(trained_on.source)
    return dataclasses.replace(HeldOut.of(trained_on), is_optional=is_moved)


def _place(source: str) -> str:
    return os.path.realpath(os.path.expanduser(source.partition(":")[2] or source))


def check_as_trained(
    name: str,
    found: Mapping[str, str],
    info: Mapping[str, Any],
    *,
    splits: Sequence[str] = ("test", "validation"),
) -> None:
    """Raises UsageError where images that are held out now are not those of a training.

    Args:
        name: The name of the set.
        found: The fingerprints of what is held out, as `ImageSet` has them.
        info: What the training's checkpoint says.
        splits: The splits to compare.
    """
    data = info.get("data")
    if not isinstance(data, Mapping):  # it was trained by another program
        return
    known = data.get("held_out") or {}
    for split in splits:
        if split in found and found[split] != known.get(split):
            raise UsageError(
                f"{name} has not the images that the checkpoint was trained on: which "
                f"of them it held out for {split} cannot be told any more."
            )


def hold_out(
    name: str,
    train: Split,
    num_held_out: int,
    *,
    option: str,
    seed: int,
    names: Sequence[str] | None = None,
) -> tuple[Split, Split, str]:
    """Returns the training images that are left, those held out, and a fingerprint.

    Both keep the order of the images, each of which is read when it is asked for.

    Args:
        name: The name of the set, for errors.
        train: The training images.
        num_held_out: The number of images to hold out.
        option: The option that asks for it, with its value, for errors.
        seed: The seed of the draw.
        names: The names of the images, where they have some.

    Raises:
        ValueError: No image would be held out, or none of a class be left.
    """
    kept, held_out = map(
        np.sort, stratified_split(train.labels, num_held_out, seed=seed)
    )
    if not len(held_out):
        raise ValueError(
            f"{option} must hold out an image; it holds out none of the "
            f"{len(train):,} training images of {name}."
        )
    places = train.images.places if isinstance(train.images, Rows) else None
    own = held_out if places is None else places[held_out]
    told = [names[place] for place in own] if names else own.tolist()
    labels = train.labels[held_out].tolist()
    text = json.dumps([len(train), told, labels])
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return train.chosen(kept), train.chosen(held_out), digest
