"""The best epoch of a run so far, by which a run may end early."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Best:
    """The first epoch of the highest validation accuracy.

    Attributes:
        epoch: The number of epochs until then; 0 before any has ended.
        top1: The validation accuracy after it, in [0, 1].
    """

    epoch: int = 0
    top1: float = -math.inf

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "Best":
        """Returns what a checkpoint says of the run until then."""
        told = info.get("best")
        return cls(int(told["epoch"]), float(told["top1"])) if told else cls()

    def after(self, epoch: int, top1: float) -> "Best":
        """Returns the best one after another epoch."""
        return Best(epoch, top1) if top1 > self.top1 else self

    def is_over(self, epoch: int, patience: int | None) -> bool:
        """Returns whether a run ends early after an epoch; None: it never does."""
        return patience is not None and epoch - self.epoch >= patience

    def why_over(self, epoch: int, epochs: int) -> str:
        """Returns why a run of so many epochs has ended after this one."""
        return (
            f"ended early, after epoch {epoch} of {epochs}: validation top-1 has not "
            f"risen for {epoch - self.epoch} epochs since epoch {self.epoch}, "
            f"{self.top1:.2%}"
        )
