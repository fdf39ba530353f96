"""scikit-learn's handwritten digits, 8 x 8, which need no download."""

import importlib.util
import pathlib

import numpy as np

from train.data.held_out import HeldOut
from train.data.sets import ImageSet, make_set
from train.data.stratify import stratified_split

_NUM_TEST = 360
_FILE = pathlib.Path("datasets", "data", "digits.csv.gz")


def load_digits(held_out: HeldOut) -> ImageSet:
    """Returns 1,437 training and 360 test images, classes balanced, always the same.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: Test images are to be held out, though there are some.
    """
    # Importing scikit-learn takes a second of CPU; reading its file, 5 ms.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    (place,) = package.submodule_search_locations
    rows = np.loadtxt(pathlib.Path(place) / _FILE, np.uint8, delimiter=",")
    # Pixels are whole numbers of 0 to 16.
    images = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8)
    images, labels = images.reshape(-1, 8, 8, 1), rows[:, -1].astype(np.int32)
    train, test = stratified_split(labels, _NUM_TEST, seed=0)
    splits = {
        "train": (images[train], labels[train]),
        "test": (images[test], labels[test]),
    }
    names = tuple(str(digit) for digit in range(10))
    return make_set("digits", splits, names, held_out)
