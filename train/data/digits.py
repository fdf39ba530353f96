"""scikit-learn's handwritten digits, 8 x 8, which need no download."""

import numpy as np

from train.data.sets import ImageSet, make_set

_NUM_TEST = 360


def load_digits() -> ImageSet:
    """Returns 1,437 training and 360 test images, classes balanced, always the same."""
    # This import takes a second, for which other sources need not wait.
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        images,
        digits.target,
        test_size=_NUM_TEST,
        stratify=digits.target,
        random_state=0,
    )
    splits = {"train": (x_train, y_train), "test": (x_test, y_test)}
    return make_set("digits", splits, tuple(str(digit) for digit in range(10)))
