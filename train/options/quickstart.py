"""The options of `python -m train quickstart`."""

import dataclasses
from collections.abc import Sequence

from train.arguments import parse_options


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Trains a narrow ResNet18 on handwritten digits and evaluates its checkpoint."""

    workdir: str = "runs/quickstart"
    """Directory of the run; a run that is there already is resumed."""


def parse(argv: Sequence[str]) -> Quickstart:
    """Reads the words after the verb."""
    return parse_options(Quickstart, argv, verb="quickstart")
