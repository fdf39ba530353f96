"""Image sets: uint8 images and labels, checked, the same from every source."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from train.data.held_out import HOW_TO_HOLD_OUT, HeldOut, hold_out
from train.data.split import Split
from train.machine.processes import warn


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of labelled images; some sources have no training images.

    Attributes:
        name: The name of the set.
        train: The images to train on; None if the source has none.
        test: The test images.
        class_names: The name of each class.
        validation: Images to choose the best checkpoint by; None: the test images.
        held_out: A fingerprint of each split that was held out of the training images,
            by name: `test` and `validation`.
    """

    name: str
    train: Split | None
    test: Split
    class_names: tuple[str, ...]
    validation: Split | None = None
    held_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
            validation=None if self.validation is None else renumbered(self.validation),
        )

    def describe(self) -> dict[str, object]:
        """Returns what must be the same when a run is resumed, as JSON."""
        return {
            "num_train": len(self.train) if self.train else 0,
            "num_test": len(self.test),
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            **({"held_out": dict(self.held_out)} if self.held_out else {}),
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


def make_splits(
    name: str, arrays: dict[str, tuple[np.ndarray, np.ndarray]], num_classes: int
) -> dict[str, Split]:
    """Checks the images and labels of `train` and `test`, of which one may be missing.

    Raises:
        ValueError: They break a rule.
    """
    splits = {
        key: _make_split(f"{name} {key}", images, labels, num_classes)
        for key, (images, labels) in arrays.items()
    }
    shapes = {key: split.images.shape[1:] for key, split in splits.items()}
    if len({*shapes.values()}) > 1:
        raise ValueError(
            f"{name}: training images are {shapes['train']}, test images "
            f"{shapes['test']}; must be of one shape."
        )
    return splits


def join_splits(
    name: str,
    splits: dict[str, Split],
    class_names: tuple[str, ...],
    held_out: HeldOut,
    image_names: Sequence[str] | None = None,
) -> ImageSet:
    """Joins splits into a set, after images were held out of `train`.

    Args:
        name: The name of the set.
        splits: What `make_splits` returns.
        class_names: The name of each class.
        held_out: What is held out of the training images.
        image_names: The names of the training images, where they have some.

    Raises:
        ValueError: There are no test images, or some are to be held out though there
            are, or none would be.
    """
    train, test, validation = splits.get("train"), splits.get("test"), None
    given = f"`data.test_share` (={held_out.test_share})"
    fingerprints: dict[str, str] = {}
    num_train = 0 if train is None else len(train)

    def hold(split: Split, share: float, key: str) -> tuple[Split, Split]:
        rest, out, fingerprints[key] = hold_out(
            name,
            split,
            round(share * num_train),
            option=f"`data.{key}_share` (={share})",
            seed=held_out.seed,
            names=image_names,
        )
        return rest, out

    if test is not None and held_out.test_share and not held_out.is_optional:
        raise ValueError(f"{given} must be 0: {name} has test images of its own.")
    if test is None:
        if train is None or not held_out.test_share:
            raise ValueError(f"{name} has no test images; {HOW_TO_HOLD_OUT}.")
        train, test = hold(train, held_out.test_share, "test")
    if train is not None and held_out.validation_share:
        train, validation = hold(train, held_out.validation_share, "validation")
    return ImageSet(name, train, test, class_names, validation, fingerprints)


def make_set(
    name: str,
    arrays: dict[str, tuple[np.ndarray, np.ndarray]],
    class_names: tuple[str, ...],
    held_out: HeldOut,
) -> ImageSet:
    """Checks the splits `train` (optional) and `test` and joins them into a set.

    Raises:
        ValueError: As `make_splits` and `join_splits`.
    """
    splits = make_splits(name, arrays, len(class_names))
    return join_splits(name, splits, class_names, held_out)


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
