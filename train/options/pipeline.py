"""The options of `python -m train pipeline`."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import Config
from train.config_file import load_from_file
from train.errors import UsageError
from train.experiments.pipeline_config import Pipeline


@dataclasses.dataclass(frozen=True)
class Run:
    """Trains a new head, compresses, fine-tunes, and fine-tunes the dense control.

    The file comes before the options, which override the `pipeline` that it defines.
    The same command resumes a pipeline that was stopped.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Python file that defines `pipeline`, such as those in configs/pipelines."""
    pipeline: Annotated[Pipeline, tyro.conf.arg(name="")]
    weights: str | None = None
    """File of the network's PyTorch weights, of torch.save or safetensors."""
    workdir: str | None = None
    """Directory of all stages; None: runs/NAME."""
    record: str | None = None
    """File to which costs and accuracies are written, as JSON."""


def parse(argv: Sequence[str]) -> Run:
    """Reads the file, then the words after it, which override it.

    Raises:
        UsageError: The file is not given, missing or broken.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("file", nargs="?")
    file = early.parse_known_args(argv)[0].file
    if file is None and not {"-h", "--help"} & set(argv):
        raise UsageError("`file` must be given, before the options.")
    default = Pipeline(run=Config())
    if file is not None:
        default = load_from_file(pathlib.Path(file), "pipeline", Pipeline)
    return parse_options(
        Run, argv, verb="pipeline", default=Run(file or tyro.MISSING, default)
    )
