"""What a file computes beside what the checkpoint computes."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from train.errors import UsageError

# The most that logits may differ by, as a share of the largest.
_MOST = {"float32": 1e-3, "bfloat16": 0.1}
# Accelerators multiply numbers of float32 in fewer bits.
_MOST_ELSEWHERE = 0.02
_IMAGES = 8

Logits = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a file's logits are from the checkpoint's, on random images.

    Attributes:
        difference: The largest difference of two logits.
        largest: The checkpoint's largest logit, without its sign.
        same: The number of images of the same class.
        count: The number of images.
    """

    difference: float
    largest: float
    same: int
    count: int

    def __str__(self) -> str:
        return (
            f"compared    largest difference from the checkpoint's logits "
            f"{self.difference:.2g} (of {self.largest:.2g}), the same class on "
            f"{self.same} of {self.count} random images"
        )


def random_input(shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """Returns random images, 8 where the shape leaves their number open."""
    sizes = tuple(_IMAGES if size is None else size for size in shape)
    rng = np.random.default_rng(0)
    if dtype == "uint8":
        return rng.integers(256, size=sizes).astype(np.uint8)
    return rng.normal(size=sizes).astype(np.float32)


def compare(
    expected: np.ndarray, found: np.ndarray, *, dtype: str, has_gates: bool
) -> Comparison:
    """Compares logits [n, classes] on the same images.

    Args:
        expected: The checkpoint's logits.
        found: The file's.
        dtype: The type that the file computes in.
        has_gates: Whether there are inertial layers. Rounding may then open or close a
            gate, so that only half of the images must agree.

    Raises:
        UsageError: They differ by more than rounding explains.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise UsageError(
            f"the file gives {list(found.shape)} logits, or some that are not finite; "
            f"the checkpoint gives {list(expected.shape)}. It was not kept."
        )
    of_images = np.abs(found - expected).max(-1)
    largest = float(np.abs(expected).max())
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    result = Comparison(float(of_images.max()), largest, same, len(expected))
    most = _MOST[dtype]
    if jax.default_backend() != "cpu":
        most = max(most, _MOST_ELSEWHERE)
    differing = float(np.median(of_images) if has_gates else of_images.max())
    if differing > most * largest:
        raise UsageError(
            f"the file's logits differ from the checkpoint's by {differing:.2g} (the "
            f"largest is {largest:.2g}), which is more than rounding. It was not kept."
        )
    return result
