"""The options of `python -m train study`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import SourceOption


@dataclasses.dataclass(frozen=True)
class RunStudy:
    """Makes smaller networks of a dense one, fine-tunes and compares them.

    Each stage is a command of this program, which is printed. The same command resumes
    what was stopped. A table and a page show accuracy, cost and time of all networks.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Python file that defines `study`, such as those in configs/studies."""
    data: SourceOption = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: what the configuration
    says, or the checkpoint of the dense network."""
    only: tuple[str, ...] = ()
    """Names of the smaller networks to make; none: all of them."""
    workdir: str | None = None
    """Directory of all runs and checkpoints; what is complete is not made again. None:
    runs/FILE, by the name of the file."""
    record: str | None = None
    """File to which the networks are written, as JSON."""


def parse(argv: Sequence[str]) -> RunStudy:
    """Reads the words after the verb."""
    return parse_options(RunStudy, argv, verb="study")
