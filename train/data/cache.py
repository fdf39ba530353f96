"""Decoded sets as memory-mapped arrays, written once."""

import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable

import numpy as np

from train.data.sets import ImageSet, make_set

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def cached_set(
    directory: pathlib.Path,
    name: str,
    decode: Callable[[], tuple[Splits, tuple[str, ...]]],
) -> ImageSet:
    """Returns the set kept in `directory`, decoding it on first use.

    Args:
        directory: Appears whole or not at all.
        name: Of the set.
        decode: Returns splits and class names.

    Raises:
        OSError: The cache cannot be written.
        ValueError: The decoded images or labels break a rule.
    """
    if not directory.is_dir():
        splits, class_names = decode()
        make_set(name, splits, class_names)  # a broken set is not kept
        # Several machines may share the directory, and process numbers repeat.
        writer = f"{socket.gethostname()}-{os.getpid()}"
        partial = directory.with_name(f".{directory.name}.partial-{writer}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for split, (images, labels) in splits.items():
                np.save(partial / f"x_{split}.npy", images)
                np.save(partial / f"y_{split}.npy", labels)
            (partial / "class_names.json").write_text(json.dumps(class_names))
            try:
                partial.rename(directory)
            except OSError:  # another process was first; its copy is the same
                if not directory.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    names = tuple(json.loads((directory / "class_names.json").read_text()))
    return make_set(
        name,
        {
            split: (
                np.load(directory / f"x_{split}.npy", mmap_mode="r"),
                np.load(directory / f"y_{split}.npy"),
            )
            for split in ("train", "test")
            if (directory / f"x_{split}.npy").is_file()
        },
        names,
    )
