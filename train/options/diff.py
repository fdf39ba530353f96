"""The options of `python -m train diff`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import CheckpointArgument, FactoryOption, SourceOption
from train.errors import UsageError
from train.evaluate.settings import EvaluationSettings


@dataclasses.dataclass(frozen=True)
class Diff:
    """Says in what two checkpoints differ: network, plan, layers' costs, variables.

    With `--data`, it also says for which test images their answers differ.
    """

    first: CheckpointArgument
    """Checkpoint, or run, of which the best checkpoint is taken."""
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")]
    """Checkpoint, or run, to compare with it."""
    data: SourceOption = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits, on which answers are compared;
    None: they are not."""
    most: int = 10
    """Number of variables, and of changed answers, that are listed: the largest."""
    factory: FactoryOption = None
    """What makes networks of your own, as MODULE:FUNCTION; None: as the checkpoints
    say."""
    out: str | None = None
    """File to which everything is written, as JSON."""
    settings: Annotated[EvaluationSettings, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=EvaluationSettings
    )

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UsageError(f"`most` (={self.most}) must be >= 1.")


def parse(argv: Sequence[str]) -> Diff:
    """Reads the words after the verb."""
    return parse_options(Diff, argv, verb="diff")
