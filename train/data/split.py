"""Images and their labels, and choices among them that copy no image."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an array, which are read when they are asked for.

    Attributes:
        base: The array, which may be memory-mapped.
        places: The rows [n], int.
    """

    base: np.ndarray
    places: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that `np.asarray` makes."""
        return (len(self.places), *self.base.shape[1:])

    @property
    def nbytes(self) -> int:
        """The bytes of the array that `np.asarray` makes."""
        return len(self.places) * self.base[:1].nbytes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return self.base[self.places[chosen]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.base[self.places], dtype)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 [n, h, w, c], c being 1 or 3; may be memory-mapped.
        labels: int32 [n].
    """

    images: np.ndarray | Rows
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, places: np.ndarray) -> "Split":
        """Returns some of the images, in the order of `places`."""
        if isinstance(self.images, Rows):
            images = Rows(self.images.base, self.images.places[places])
        else:
            images = Rows(self.images, places)
        return Split(images, self.labels[places])
