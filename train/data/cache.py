"""Decoded sets as memory-mapped arrays, written once."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from inertia_jax.atomic import appearing
from train.data.sets import ImageSet, make_set

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def cached_set(
    directory: pathlib.Path,
    name: str,
    decode: Callable[[], tuple[Splits, tuple[str, ...]]],
) -> ImageSet:
    """Returns the set kept in `directory`, decoding it on first use.

    `decode` returns splits and class names. The directory appears whole or not at all.

    Raises:
        OSError: The cache cannot be written.
        ValueError: The decoded images or labels break a rule.
    """
    if not directory.is_dir():
        splits, class_names = decode()
        make_set(name, splits, class_names)  # a broken set is not kept
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
    return read_set(directory, name)


def read_set(directory: pathlib.Path, name: str) -> ImageSet:
    """Returns the set that `cached_set` has written.

    Raises:
        ValueError: A file of it is missing or damaged.
    """
    try:
        splits = {
            split: (
                np.load(directory / f"x_{split}.npy", mmap_mode="r"),
                np.load(directory / f"y_{split}.npy"),
            )
            for split in ("train", "test")
            if (directory / f"x_{split}.npy").is_file()
        }
        names = tuple(json.loads((directory / "class_names.json").read_text()))
        return make_set(name, splits, names)
    except (FileNotFoundError, ValueError, EOFError, KeyError) as error:
        raise ValueError(
            f"{directory} is damaged; remove it, and it is made again: {error}."
        ) from error
