"""Image sets: uint8 images and labels, checked, the same from every source."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.machine.processes import warn


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 [n, h, w, c], c being 1 or 3; may be memory-mapped.
        labels: int32 [n].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of labelled images; some sources have no training images."""

    name: str
    train: Split | None
    test: Split
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def places_in(self, class_names: Sequence[str]) -> tuple[int, ...] | None:
        """Returns where each class stands among those of a checkpoint, by name.

        None means that names do not tell which class is which: they are missing (then
        numbers stand for them), occur twice, or are not all the checkpoint's.
        """
        places = {name: place for place, name in enumerate(class_names)}
        has_names = self.class_names != tuple(map(str, range(self.num_classes)))
        is_clear = len(places) == len(class_names)
        if not (has_names and is_clear and {*self.class_names} <= places.keys()):
            return None
        return tuple(places[name] for name in self.class_names)

    def with_classes(self, class_names: Sequence[str]) -> "ImageSet | None":
        """Returns the set with labels that count a checkpoint's classes, by name.

        None means that names do not tell which class is which, as for `places_in`.
        """
        places = self.places_in(class_names)
        if places is None:
            return None
        found = np.array(places, np.int32)

        def renumbered(split: Split) -> Split:
            return dataclasses.replace(split, labels=found[split.labels])

        return dataclasses.replace(
            self,
            class_names=tuple(class_names),
            train=None if self.train is None else renumbered(self.train),
            test=renumbered(self.test),
        )

    def describe(self) -> dict[str, object]:
        """Returns what must be the same when a run is resumed, as JSON."""
        return {
            "num_train": len(self.train) if self.train else 0,
            "num_test": len(self.test),
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of the images as stored."""
        height, width, channels = self.test.images.shape[1:]
        return (height, width, channels)


def _make_split(
    name: str, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> Split:
    """Checks images and labels; `name` is for messages."""
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: images have type {images.dtype}; must be uint8.")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{name}: images have shape {images.shape}; must be [n, h, w, 1 or 3]."
        )
    if len(images) == 0:
        raise ValueError(f"{name}: there are no images.")
    if images.size == 0:
        raise ValueError(f"{name}: images have shape {images.shape}; must have pixels.")
    if labels.shape == (len(images), 1):  # as Keras has them
        labels = labels[:, 0]
    if labels.shape != (len(images),):
        raise ValueError(
            f"{name}: labels have shape {labels.shape}; must be ({len(images)},)."
        )
    check_labels(name, labels)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name}: labels span [{low}, {high}]; must be in [0, {num_classes - 1}]."
        )
    return Split(images, np.asarray(labels, np.int32))


def check_labels(name: str, labels: np.ndarray) -> None:
    """Raises ValueError unless labels are integers."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: labels have type {labels.dtype}; must be integer.")


def make_set(
    name: str,
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    class_names: tuple[str, ...],
) -> ImageSet:
    """Checks the splits `train` (optional) and `test` and joins them into a set.

    Raises:
        ValueError: The images or labels break a rule.
    """
    made = {
        key: _make_split(f"{name} {key}", images, labels, len(class_names))
        for key, (images, labels) in splits.items()
    }
    train, test = made.get("train"), made["test"]
    if train is not None and train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{name}: training images are {train.images.shape[1:]}, test images "
            f"{test.images.shape[1:]}; must be of one shape."
        )
    return ImageSet(name, train, test, class_names)


def warn_of_other_names(data: ImageSet, class_names: Sequence[str]) -> None:
    """Warns on standard error where data name a class differently than a checkpoint.

    Numbers, which stand for missing names, agree with all names.
    """
    count = min(len(data.class_names), len(class_names))
    numbers = tuple(map(str, range(count)))
    here, there = data.class_names[:count], tuple(class_names[:count])
    if numbers in (here, there):
        return
    for label in range(count):
        if here[label] != there[label]:
            warn(
                f"label {label} is {here[label]!r} in {data.name} and "
                f"{there[label]!r} in the checkpoint."
            )
            return
