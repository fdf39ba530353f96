"""The configuration of a pipeline, and its claim on a directory."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from train.compress.rank_rules import parse_ranks
from train.config import Config
from train.errors import UsageError, user_input
from train.run.directory import is_empty_directory, read_json, write_whole


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
        for name in ("init", "teacher", "train_only"):
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
        for rule in self.ranks:
            parse_ranks(rule)


def _describe(pipeline: Pipeline) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(pipeline)))


def _hash_weights(weights: str) -> str:
    with user_input(), pathlib.Path(weights).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_claim(pipeline: Pipeline, weights: str | None, workdir: pathlib.Path) -> None:
    """Checks that the directory is free, or holds this pipeline and these weights."""
    file = workdir / "pipeline.json"
    if not file.is_file():
        if workdir.exists() and not is_empty_directory(workdir):
            raise UsageError(
                f"{workdir} exists and holds no pipeline; nothing was changed."
            )
        return
    record = read_json(file)
    if not isinstance(record, dict):
        raise UsageError(f"{file} holds no pipeline; nothing was changed.")
    known = record.pop("weights_sha256", None)
    if record != _describe(pipeline):
        raise UsageError(
            f"{workdir} holds a pipeline with other settings; nothing was changed. "
            f"Give another --workdir."
        )
    if weights is None or known is None:
        return
    if not pathlib.Path(weights).expanduser().is_file():
        print(f"{weights} is not there any more; what was read of it before is used.")
    elif known != _hash_weights(weights):
        raise UsageError(
            f"{workdir} holds a pipeline of other weights than {weights}; nothing was "
            f"changed. Give another --workdir."
        )


def claim(pipeline: Pipeline, weights: str | None, workdir: pathlib.Path) -> None:
    """Writes into the directory which pipeline and which weights it belongs to."""
    record = _describe(pipeline)
    if weights is not None:
        record["weights_sha256"] = _hash_weights(weights)
    with user_input():
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "pipeline.json", json.dumps(record, indent=1) + "\n")
