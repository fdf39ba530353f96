"""The options of `python -m train report`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import FactoryOption, SourceOption
from train.evaluate.settings import EvaluationSettings


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes a page about runs and checkpoints, side by side, and their record.

    The page is one file, OUT.html, which needs no network. OUT.md has its tables, and
    OUT.json all numbers. A single run also has its learning curve in OUT.png.
    """

    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN_OR_CHECKPOINT [RUN_OR_CHECKPOINT ...]"),
    ]
    """Directories of runs, of which the best checkpoint is taken, and checkpoints."""
    out: str | None = None
    """Stem of the files, or the name of one of them. A directory, or what ends with a
    slash, has them as report.*; None: RUN/report for a single run, and ./report for
    anything else."""
    seconds_to: tuple[float, ...] = ()
    """Test accuracies in (0, 1], for each of which the seconds of training until then
    are reported."""
    data: SourceOption = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: the data that each network
    was trained on."""
    images: int = 6
    """Number of test images on which friction and gates are shown."""
    latency: bool = False
    """Time all networks in turn, on this machine. Times that OUT.json has of the same
    networks here are not measured again; they are shown with and without this."""
    device: str | None = None
    """Chip whose compiler estimates cycles, v4, v5e, v5p or v6e; it need not be there,
    but libtpu must (the extra `tpu`)."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    settings: Annotated[EvaluationSettings, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=EvaluationSettings
    )


def parse(argv: Sequence[str]) -> Report:
    """Reads the words after the verb."""
    return parse_options(Report, argv, verb="report")
