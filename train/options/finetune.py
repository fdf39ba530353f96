"""The options of `python -m train finetune`."""

import dataclasses
from collections.abc import Sequence

import tyro

from train.arguments import parse_options
from train.config import FINETUNE, CheckpointArgument, Config
from train.options.fit import RunArguments


@dataclasses.dataclass(frozen=True)
class Finetune(RunArguments):
    """Trains a checkpoint's network further, on the data of its training by default.

    The checkpoint comes before the options; it fixes network and normalisation.
    """

    checkpoint: CheckpointArgument = tyro.MISSING
    """Checkpoint, or run, of which the best checkpoint is taken."""


def parse(
    argv: Sequence[str], default: Config = FINETUNE, *, file: str | None = None
) -> Finetune:
    """Reads the words after the verb.

    Args:
        argv: The words.
        default: The configuration before them, which the checkpoint has a say in.
        file: The file of configurations that was read.
    """
    return parse_options(
        Finetune, argv, verb="finetune", default=Finetune(default, config=file)
    )
