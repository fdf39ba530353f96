"""The configuration of a pipeline."""

import dataclasses

from train.config import Config
from train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The stages that a network goes through.

    First the head is drawn anew and trained alone. Then the network is compressed and
    fine-tuned, once for each rule of `ranks`. As a control, the dense network is
    fine-tuned as often and for as long, from labels alone.
    """

    run: Config
    """Configuration of every training; its epochs are those of each fine-tuning."""
    head: str = "fc"
    """Layer that is drawn anew for the data's classes."""
    head_epochs: int = 5
    """Epochs in which the head alone is trained."""
    ranks: tuple[str, ...] = ("ratio:0.2",)
    """Rules in the form that `compress` takes; each is applied to the result of the
    one before."""
    recalibration_images: int = 0
    """Number of training images that recalibrate BatchNorm after compressing; 0: it
    is not recalibrated."""
    distill: bool = False
    """Fine-tune with the network after head training as the teacher."""
    control: bool = True
    """Fine-tune the dense network, too."""

    def __post_init__(self) -> None:
        if self.head_epochs < 1:
            raise UsageError(f"`head_epochs` (={self.head_epochs}) must be >= 1.")
        if not self.ranks:
            raise UsageError("`ranks` must have at least one rule.")
        if self.recalibration_images < 0 or self.recalibration_images == 1:
            raise UsageError(
                f"`recalibration_images` (={self.recalibration_images}) must be 0 or "
                f">= 2."
            )
        for name in ("init", "new_head", "teacher", "train_only"):
            if getattr(self.run, name):
                raise UsageError(
                    f"`run.{name}` (={getattr(self.run, name)}) must not be set: the "
                    f"stages set it themselves."
                )
        if self.run.model.factory is not None:
            raise UsageError(
                f"`run.model.factory` (={self.run.model.factory}) must be None: a "
                f"pipeline takes this library's networks alone. Of one of your own, "
                f"the verbs do the same: import, finetune --new-head --train-only "
                f"HEAD, compress --finetune-epochs."
            )
        if self.ranks == Pipeline.ranks:
            return  # help, which has the default, need not wait for this import
        from train.compress.rank_rules import parse_ranks

        for rule in self.ranks:
            parse_ranks(rule)
