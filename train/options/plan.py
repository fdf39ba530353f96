"""The options of `python -m train plan`."""

import dataclasses
from collections.abc import Sequence

from train.arguments import parse_options
from train.config import CheckpointArgument, FactoryOption


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shows what stands at each layer of a checkpoint's network, and what it costs."""

    checkpoint: CheckpointArgument
    """Checkpoint, or run, of which the best checkpoint is taken."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    out: str | None = None
    """File to which the plan is written, as `Plan.to_json` has it; `compress --ranks
    plan:FILE` takes one of Tucker-2 factors."""


def parse(argv: Sequence[str]) -> Plan:
    """Reads the words after the verb."""
    return parse_options(Plan, argv, verb="plan")
