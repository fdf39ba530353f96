"""Decoded sets as memory-mapped arrays, written once."""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from inertia_jax.atomic import appearing
from train.data.held_out import NOTHING, HeldOut
from train.data.sets import ImageSet, join_splits, make_splits

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def cached_set(
    directory: pathlib.Path,
    name: str,
    decode: Callable[[], tuple[Splits, tuple[str, ...]]],
    held_out: HeldOut = NOTHING,
    image_names: Sequence[str] | None = None,
) -> ImageSet:
    """Returns the set kept in `directory`, decoding it on first use.

    The directory appears whole or not at all.

    Args:
        directory: The directory.
        name: The name of the set.
        decode: A function that returns splits and class names.
        held_out: What is held out of the training images, which are kept whole.
        image_names: The names of the training images, where they have some.

    Raises:
        OSError: The cache cannot be written.
        ValueError: The decoded images or labels break a rule, or nothing can be held
            out of them.
    """
    if not directory.is_dir():
        splits, class_names = decode()
        make_splits(name, splits, len(class_names))  # a broken set is not kept
        try:
            with appearing(directory) as partial:
                partial.mkdir()
                for split, (images, labels) in splits.items():
                    np.save(partial / f"x_{split}.npy", images)
                    np.save(partial / f"y_{split}.npy", labels)
                (partial / "class_names.json").write_text(json.dumps(class_names))
        except OSError:  # another process may have been first; its copy is the same
            if not directory.is_dir():
                raise
    return read_set(directory, name, held_out, image_names)


def read_set(
    directory: pathlib.Path,
    name: str,
    held_out: HeldOut,
    image_names: Sequence[str] | None = None,
) -> ImageSet:
    """Returns the set that `cached_set` has written.

    Raises:
        ValueError: A file of it is missing or damaged, or nothing can be held out.
    """
    try:
        arrays = {
            split: (
                np.load(directory / f"x_{split}.npy", mmap_mode="r"),
                np.load(directory / f"y_{split}.npy"),
            )
            for split in ("train", "test")
            if (directory / f"x_{split}.npy").is_file()
        }
        if not arrays:
            raise FileNotFoundError("there are no images in it")
        names = tuple(json.loads((directory / "class_names.json").read_text()))
        splits = make_splits(name, arrays, len(names))
    except (FileNotFoundError, ValueError, EOFError, KeyError) as error:
        raise ValueError(
            f"{directory} is damaged; remove it, and it is made again: {error}."
        ) from error
    return join_splits(name, splits, names, held_out, image_names)
