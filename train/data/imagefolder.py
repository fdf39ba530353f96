"""Folders of images, one a class: PATH/train/CLASS/*.png and PATH/test (or val).

Test images may also be held out of PATH/train/CLASS/*.png, or of PATH/CLASS/*.png.
"""

import collections
import hashlib
import math
import pathlib

import numpy as np

from inertia_jax.metadata import shortest_sides
from train.data.cache import Splits, cached_set
from train.data.held_out import HOW_TO_HOLD_OUT, HeldOut
from train.data.image_files import (
    LeftOut,
    describe_left_out,
    list_images,
    read_image,
)
from train.data.sets import ImageSet
from train.errors import shortened
from train.machine.processes import warn

Files = list[tuple[pathlib.Path, int]]


def load_imagefolder(
    path: str,
    *,
    cache_dir: str,
    sides: tuple[int, int] | None,
    how_to_resize: str,
    for_training: bool,
    held_out: HeldOut,
) -> ImageSet:
    """Reads an image folder, brought to one size and kept decoded.

    Images become RGB, are resized to cover `sides` (bilinear), and their centre is cut
    out. Without `sides` all must have one size already. Classes are the sub-folders of
    `train`, sorted. Their images are those of torchvision's `ImageFolder`, in all
    formats that Pillow reads; what is hidden is left out. A line on standard error
    names the files that are left out.

    Raises:
        FileNotFoundError: The folder of a split or class is missing or empty.
        ValueError: Images of several sizes, an unreadable image, test classes that
            training lacks, or, for training, one class with folders like classes; or
            nothing can be held out.
    """
    root = pathlib.Path(path).expanduser()
    folders = _split_folders(root)
    if held_out.test_share:
        folders = _training_folder(root, folders, held_out)
    for folder in folders.values():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder}; imagefolder:PATH needs "
                f"PATH/train/CLASS/*.png and PATH/test/CLASS/*.png (or PATH/val)."
                f"{_hint(root, folders)}"
            )
    classes = tuple(_class_folders(folders["train"]))
    left_out: LeftOut = collections.Counter()
    files = {s: _list_files(f, classes, left_out) for s, f in folders.items()}
    if left_out:
        warn(describe_left_out(root, left_out))
    for split, folder in folders.items():
        _check_classes(folder, classes, files[split])
    inner = _class_folders(folders["train"] / classes[0])
    if for_training and len(classes) == 1 and len(inner) > 1:
        raise ValueError(
            f"{folders['train']} has one class, {classes[0]!r}, and training needs two "
            f"or more; if the folders in it are the classes {shortened(inner)}, they "
            f"belong one level higher."
        )

    size = None if sides is None else shortest_sides(sides)
    fingerprint = hashlib.sha256(repr((size, classes)).encode())
    for listed in files.values():
        for file, label in listed:
            stat = file.stat()
            line = f"{file} {label} {stat.st_size} {stat.st_mtime_ns}\n"
            fingerprint.update(line.encode(errors="surrogateescape"))
    root_name = root.absolute().name  # that of `.`, too
    name = f"imagefolder-{root_name}-{fingerprint.hexdigest()[:16]}"

    def decode() -> tuple[Splits, tuple[str, ...]]:
        splits = {
            split: (
                _decode_all([file for file, _ in listed], sides, how_to_resize),
                np.array([label for _, label in listed], np.int32),
            )
            for split, listed in files.items()
        }
        return splits, classes

    return cached_set(
        pathlib.Path(cache_dir).expanduser() / name,
        root_name,
        decode,
        held_out,
        [str(file.relative_to(folders["train"])) for file, _ in files["train"]],
    )


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns where the training and the test images of a folder lie, or would."""
    test, val = root / "test", root / "val"
    is_val = val.is_dir() and not test.is_dir()
    return {"train": root / "train", "test": val if is_val else test}


def _training_folder(
    root: pathlib.Path, folders: dict[str, pathlib.Path], held_out: HeldOut
) -> dict[str, pathlib.Path]:
    """Returns where the images lie of which test images are held out.

    Raises:
        ValueError: There is a folder of test images, and none may be.
    """
    if folders["test"].is_dir():
        if held_out.is_optional:
            return folders
        raise ValueError(
            f"`data.test_share` (={held_out.test_share}) must be 0: {root} has test "
            f"images of its own, in {folders['test'].name}."
        )
    has_classes = not folders["train"].is_dir() and root.is_dir()
    return {"train": root if has_classes else folders["train"]}


def _hint(root: pathlib.Path, folders: dict[str, pathlib.Path]) -> str:
    """Returns a hint at what makes up for a folder that is missing, if one is plain.

    That is a folder a level or two above or below, or holding test images out.
    """
    below = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    near = [*sorted(below), *root.absolute().parents[:2]]
    fits = [p for p in near if all(f.is_dir() for f in _split_folders(p).values())]
    if len(fits) == 1:
        return f" Did you mean imagefolder:{fits[0]}?"
    if fits or not below or folders["test"].is_dir():
        return ""
    return f" Without these, {HOW_TO_HOLD_OUT}; PATH/CLASS/*.png will do, too."


def _class_folders(folder: pathlib.Path) -> list[str]:
    """Returns the names of sub-folders that are not hidden."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )


def _list_files(
    folder: pathlib.Path, classes: tuple[str, ...], left_out: LeftOut
) -> Files:
    """Returns images and labels by class; adds the files that it leaves out."""
    images, others = list_images(folder)
    left_out.update(others)
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    for file in images:
        name, *below = file.relative_to(folder).parts
        if not below:
            left_out["outside the folders of classes", file] += 1
        else:
            # A class that training lacks is refused later.
            files.append((file, labels.get(name, -1)))
    return files


def _check_classes(
    folder: pathlib.Path, classes: tuple[str, ...], files: Files
) -> None:
    found = _class_folders(folder)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(
            f"{folder} holds classes {shortened(unknown)} that train/ does not have."
        )
    if not files:
        raise FileNotFoundError(f"there are no images in {folder}/CLASS/.")
    empty = sorted({*found} - {classes[label] for _, label in files})
    if empty:
        raise FileNotFoundError(f"there are no images in {folder / empty[0]}.")


def _decode_all(
    files: list[pathlib.Path], sides: tuple[int, int] | None, how_to_resize: str
) -> np.ndarray:
    images = np.empty(0, np.uint8)
    for index, file in enumerate(files):
        image = read_image(file, sides)
        if index == 0:
            shape = (len(files), *image.shape)
            try:
                images = np.empty(shape, np.uint8)
            except MemoryError as error:
                raise ValueError(
                    f"{file} has shape {image.shape}; {len(files):,} of these take "
                    f"{math.prod(shape) / 1e9:,.0f} GB, more than there is: "
                    f"{how_to_resize}."
                ) from error
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{file} has shape {image.shape}, {files[0]} {images.shape[1:]}; must "
                f"be one: {how_to_resize}."
            )
        images[index] = image
    return images
