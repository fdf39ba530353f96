"""The options of `python -m train quickstart`."""

import dataclasses
from collections.abc import Sequence

from train.arguments import parse_options


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Trains a network on handwritten digits, compresses it, and compares the results.

    A narrow ResNet18 is trained dense. Of it are made one with Tucker-2 factors and one
    with inertial convolutions, and both are fine-tuned. A table and a page show
    accuracy, cost and time of the three. Each stage is a command of this program, which
    is printed. The same command resumes what was stopped.
    """

    workdir: str = "runs/quickstart"
    """Directory of all runs and checkpoints; what is complete is not made again."""


def parse(argv: Sequence[str]) -> Quickstart:
    """Reads the words after the verb."""
    return parse_options(Quickstart, argv, verb="quickstart")
