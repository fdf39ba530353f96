"""NumPy archives with Keras's keys: x_train, y_train, x_test, y_test."""

import pathlib

import numpy as np

from train.data.held_out import HOW_TO_HOLD_OUT, HeldOut
from train.data.sets import ImageSet, check_labels, make_set
from train.errors import shortened

_KEYS = frozenset(("x_train", "y_train", "x_test", "y_test", "label_names"))
# Without names, a label above this is taken for an error, not for so many classes.
_MOST_UNNAMED = 100_000


def load_npz(path: str, held_out: HeldOut) -> ImageSet:
    """Reads an archive of uint8 NHWC images.

    `x_test` and `y_test` are required, unless test images are held out of `x_train`;
    `x_train` and `y_train` only for training. `label_names` names the classes. Without
    it, their number is the highest label plus one. Other arrays are not read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or declares more than memory can hold; a
            missing key, images or labels that break a rule, or nothing can be held out
            of them.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}; npz:PATH needs an archive with the keys "
            f"x_train, y_train, x_test, y_test (np.savez)."
        )
    try:
        # NumPy would leave a damaged file open.
        with file.open("rb") as stream, np.load(stream) as archive:
            held = archive.files
            arrays = {key: archive[key] for key in _KEYS.intersection(held)}
    # The readers of zip files and of NumPy's headers, which are Python, raise whatever
    # damaged bytes lead them to: zlib.error, TokenError, MemoryError and more.
    except Exception as error:
        reason = f"{error!s:.200}" or type(error).__name__
        raise ValueError(f"{file} is no NumPy archive: {reason}.") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns the bytes of other files
            raise ValueError(f"{file} holds {key!r:.100}, which is no array.")
    training = {"x_train", "y_train"} if {"x_train", "y_train"} & set(arrays) else set()
    testing = {"x_test", "y_test"}
    if held_out.test_share and not testing & set(arrays):
        testing, training = set(), {"x_train", "y_train"}
    for key in sorted(testing | training):
        if key not in arrays:
            has_only_training = not testing & set(arrays) and "x_train" in arrays
            advice = f" ({HOW_TO_HOLD_OUT})" if has_only_training and testing else ""
            raise ValueError(
                f"{file} holds {shortened(sorted(held))}; must hold {key!r}{advice}."
            )
    splits = {
        split: (arrays[f"x_{split}"], arrays[f"y_{split}"])
        for split in ("train", "test")
        if f"x_{split}" in arrays
    }
    if "label_names" in arrays:
        names = _as_names(arrays["label_names"])
    else:
        for split, (_, labels) in splits.items():
            check_labels(f"{file.stem} {split}", labels)
        highest = max(int(labels.max(initial=0)) for _, labels in splits.values())
        if highest >= _MOST_UNNAMED:
            raise ValueError(
                f"{file} has label {highest}; must be below {_MOST_UNNAMED} without "
                f"'label_names'."
            )
        names = tuple(str(label) for label in range(highest + 1))
    # Keras stores gray images without a channel axis.
    splits = {
        split: (images[..., None] if images.ndim == 3 else images, labels)
        for split, (images, labels) in splits.items()
    }
    return make_set(file.stem, splits, names, held_out)


def _as_names(names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1:
        raise ValueError(f"'label_names' has shape {names.shape}; must be [classes].")
    return tuple(
        name.decode() if isinstance(name, bytes) else str(name)
        for name in names.tolist()
    )
