"""`python -m train pipeline`: compress PyTorch weights and fine-tune them."""

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
from train.experiments.pipeline import make_pipeline_record, run_pipeline, summarise
from train.experiments.pipeline_config import Pipeline
from train.run.outputs import check_output_file, write_json


@dataclasses.dataclass(frozen=True)
class Run:
    """Trains a new head, compresses, fine-tunes, and fine-tunes the dense control.

    The file comes before the options, which override the `pipeline` that it defines.
    The same command resumes a pipeline that was stopped.
    """

    file: Annotated[str, tyro.conf.Positional]
    """Python file that defines `pipeline`, such as those in configs/pipelines."""
    pipeline: Annotated[Pipeline, tyro.conf.arg(name="")]
    weights: str | None = None
    """File of the network's PyTorch weights, of torch.save or safetensors."""
    workdir: str | None = None
    """Directory of all stages; None: runs/NAME."""
    record: str | None = None
    """File to which costs and accuracies are written, as JSON."""


def run(argv: Sequence[str]) -> int:
    """Runs as the arguments say, and prints a row for each stage."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("file", nargs="?")
    file = early.parse_known_args(argv)[0].file
    if file is None and not {"-h", "--help"} & set(argv):
        raise UsageError("`file` must be given, before the options.")
    default = Pipeline(run=Config())
    if file is not None:
        default = load_from_file(pathlib.Path(file), "pipeline", Pipeline)
    args = parse_options(
        Run, argv, verb="pipeline", default=Run(file or tyro.MISSING, default)
    )
    pipeline = args.pipeline
    workdir = pathlib.Path(args.workdir or f"runs/{pipeline.run.name}").expanduser()
    check_output_file("record", args.record)
    stages = run_pipeline(pipeline, weights=args.weights, workdir=workdir)
    if stages is None:
        print("stopped and saved; the same command goes on.")
        return 0
    print(summarise(stages))
    write_json(args.record, make_pipeline_record(pipeline, stages))
    return 0
