"""Folders of images, one a class: PATH/train/CLASS/*.png and PATH/test (or val)."""

import hashlib
import pathlib

import numpy as np

from inertia_jax.metadata import shortest_sides
from train.data.cache import Splits, cached_set
from train.data.resize import resize_and_crop
from train.data.sets import ImageSet

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_imagefolder(
    path: str, *, cache_dir: str, sides: tuple[int, int] | None
) -> ImageSet:
    """Reads an image folder, brought to one size and kept decoded.

    Images become RGB, are resized to cover `sides` (bilinear), and their centre is cut
    out. Without `sides` all must have one size already. Classes are the sub-folders of
    `train`, sorted.

    Raises:
        FileNotFoundError: The folder of a split or class is missing or empty.
        ValueError: Images of several sizes, an unreadable image, or test classes that
            training lacks.
    """
    root = pathlib.Path(path).expanduser()
    folders = {"train": root / "train", "test": root / "test"}
    if not folders["test"].is_dir():
        folders["test"] = root / "val"
    for folder in folders.values():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder}; imagefolder:PATH needs "
                f"PATH/train/CLASS/*.png and PATH/test/CLASS/*.png (or PATH/val)."
            )
    classes = tuple(_class_folders(folders["train"]))
    files = {split: _list_files(folder, classes) for split, folder in folders.items()}

    size = None if sides is None else shortest_sides(sides)
    fingerprint = hashlib.sha256(repr((size, classes)).encode())
    for split in files.values():
        for file, label in split:
            stat = file.stat()
            line = f"{file} {label} {stat.st_size} {stat.st_mtime_ns}\n"
            fingerprint.update(line.encode())
    name = f"imagefolder-{root.name}-{fingerprint.hexdigest()[:16]}"

    def decode() -> tuple[Splits, tuple[str, ...]]:
        splits = {
            split: (
                _decode_all([file for file, _ in listed], sides),
                np.array([label for _, label in listed], np.int32),
            )
            for split, listed in files.items()
        }
        return splits, classes

    return cached_set(pathlib.Path(cache_dir).expanduser() / name, root.name, decode)


def _list_files(
    folder: pathlib.Path, classes: tuple[str, ...]
) -> list[tuple[pathlib.Path, int]]:
    found = _class_folders(folder)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds classes {unknown} that train/ does not have.")
    files = [
        (file, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(f"there are no images in {folder}/CLASS/.")
    empty = sorted({*found} - {classes[label] for _, label in files})
    if empty:
        raise FileNotFoundError(f"there are no images in {folder / empty[0]}.")
    return files


def _class_folders(folder: pathlib.Path) -> list[str]:
    """Returns the names of sub-folders that are not hidden."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )


def _decode_all(files: list[pathlib.Path], sides: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image

    images = np.empty(0, np.uint8)
    for index, file in enumerate(files):
        try:
            image = _decode(file, sides)
        # UnidentifiedImageError is an OSError; a broken PNG is a SyntaxError.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read {file}: {error}.") from error
        if index == 0:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{file} has shape {image.shape}, {files[0]} {images.shape[1:]}; must "
                f"be one: set `data.image_size` to have them resized."
            )
        images[index] = image
    return images


def _decode(file: pathlib.Path, sides: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as opened:
        # Pillow would cut these to 8 bits instead of scaling them.
        if opened.mode == "F" or opened.mode.startswith("I"):
            raise ValueError(
                f"{file} has pixels of mode {opened.mode!r}; must have 8 bits each."
            )
        image = np.asarray(opened.convert("RGB"))
    return image if sides is None else resize_and_crop(image, sides)
