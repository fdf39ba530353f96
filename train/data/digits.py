"""scikit-learn's handwritten digits, 8 x 8, which need no download."""

import importlib.util
import pathlib

import numpy as np

from train.data.sets import ImageSet, make_set

_NUM_TEST = 360
_FILE = pathlib.Path("datasets", "data", "digits.csv.gz")


def load_digits() -> ImageSet:
    """Returns 1,437 training and 360 test images, classes balanced, always the same.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
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
    train, test = _split(labels)
    splits = {
        "train": (images[train], labels[train]),
        "test": (images[test], labels[test]),
    }
    return make_set("digits", splits, tuple(str(digit) for digit in range(10)))


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples of training and of test, each class in both by its share.

    They are those of scikit-learn's `train_test_split` with `stratify=labels` and
    `random_state=0`.
    """
    rng = np.random.RandomState(0)
    counts = np.bincount(labels)
    num_train = _shares(counts, len(labels) - _NUM_TEST, rng)
    num_test = _shares(counts - num_train, _NUM_TEST, rng)
    train, test = [], []
    for label, (first, second) in enumerate(zip(num_train, num_test, strict=True)):
        members = np.flatnonzero(labels == label)
        members = members[rng.permutation(len(members))]
        train.append(members[:first])
        test.append(members[first : first + second])
    return (
        rng.permutation(np.concatenate(train)),
        rng.permutation(np.concatenate(test)),
    )


def _shares(counts: np.ndarray, total: int, rng: np.random.RandomState) -> np.ndarray:
    """Returns how many of each class make up `total`; the largest remainders win."""
    wanted = counts / counts.sum() * total
    shares = np.floor(wanted)
    remainders = wanted - shares
    for remainder in np.unique(remainders)[::-1]:
        missing = int(total - shares.sum())
        if missing == 0:
            break
        equal = np.flatnonzero(remainders == remainder)
        chosen = rng.choice(equal, min(len(equal), missing), replace=False)
        shares[chosen] += 1
    return shares.astype(int)
