"""Options of an evaluation."""

import dataclasses

from train.config import CacheDirOption, Data
from train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How test images are evaluated."""

    cache_dir: CacheDirOption = Data.cache_dir
    """Directory in which decoded sets are kept."""
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
