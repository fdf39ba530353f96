"""The options of `python -m train sweep`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import SourceOption


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    """Trains the runs that a file lists.

    Runs that have a record are skipped; a run that was stopped is resumed.
    """

    sweep: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Python file that defines `sweep`, a Sweep of train.experiments.sweep."""
    out: str
    """File of JSON lines, to which each run appends a record when it ends."""
    data: SourceOption = None
    """Data that replace every run's `data.source`."""
    only: tuple[str, ...] = ()
    """Names of the runs to train; none: all of them."""
    workdir: str = "runs/sweeps"
    """Directory in which the runs' directories are made and kept."""
    max_runs: int | None = None
    """Number of runs after which to stop; None: all of them are trained."""


def parse(argv: Sequence[str]) -> SweepArguments:
    """Reads the words after the verb."""
    return parse_options(SweepArguments, argv, verb="sweep")
