"""Options of an evaluation."""

import dataclasses

from train.config import CacheDirOption
from train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How test images are evaluated."""

    cache_dir: CacheDirOption = None
    """Directory in which decoded sets are kept; None: the training's, if it is here."""
    batch_size: int = 500
    """Images a step, over all devices."""
    devices: int | None = None
    """Number of devices to use, the first ones; None: all."""
    resize: bool = False
    """Resize images whose size is not that of the network's input."""
    flip_test: bool = False
    """Evaluate by the mean logits of each image and its mirror image."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"`batch_size` (={self.batch_size}) must be >= 1.")
