"""The options of `python -m train evaluate`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import CheckpointArgument, FactoryOption, SourceOption
from train.evaluate.settings import EvaluationSettings
from train.machine.settings import Processes


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates a checkpoint on every test image, each once."""

    checkpoint: CheckpointArgument
    """Checkpoint, or run, of which the best checkpoint is taken."""
    data: SourceOption = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: the data that the network
    was trained on."""
    against: str | None = None
    """Checkpoint, or run, to compare with on the same data, image by image."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    out: str | None = None
    """File to which everything is written, as JSON."""
    settings: Annotated[EvaluationSettings, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=EvaluationSettings
    )
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Processes
    )


def parse(argv: Sequence[str]) -> Evaluate:
    """Reads the words after the verb."""
    return parse_options(Evaluate, argv, verb="evaluate")
