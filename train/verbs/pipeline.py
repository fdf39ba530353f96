"""`python -m train pipeline`: compress PyTorch weights and fine-tune them."""

import pathlib
from collections.abc import Sequence

from train.experiments.pipeline import (
    StoppedError,
    make_pipeline_record,
    run_pipeline,
    summarise,
)
from train.fit.loop import exit_code
from train.options.pipeline import parse
from train.result import add_result
from train.run.outputs import check_output_file, write_json


def run(argv: Sequence[str]) -> int:
    """Runs as the arguments say, and prints a row for each stage."""
    args = parse(argv)
    pipeline = args.pipeline
    workdir = pathlib.Path(args.workdir or f"runs/{pipeline.run.name}").expanduser()
    check_output_file("record", args.record)
    try:
        stages = run_pipeline(pipeline, weights=args.weights, workdir=workdir)
    except StoppedError as stopped:
        print("stopped and saved; the same command goes on.")
        return exit_code(stopped.result)
    print(summarise(stages))
    record = make_pipeline_record(pipeline, stages)
    add_result(record)
    write_json(args.record, record)
    return 0
