"""`python -m train sweep`: many runs, one record a run."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.errors import user_input
from train.sweep import find_record, load_sweep, read_records, run_one, summarise


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    """Runs what a file lists, skips what is recorded, goes on with what was stopped."""

    sweep: Annotated[str, tyro.conf.Positional]
    """Python file that defines `sweep`, a train.sweep.Sweep."""
    out: str
    """JSON lines; a record is appended when its run ends."""
    data: str | None = None
    """In place of every run's `data.source`."""
    only: tuple[str, ...] = ()
    """Names of runs; none: all."""
    workdir: str = "runs/sweeps"
    """Runs that are under way; one that has ended is kept there too."""
    max_runs: int | None = None
    """Stop after so many; None: when all are done."""


def run(argv: Sequence[str]) -> int:
    """Runs what is missing and prints the table so far."""
    args = tyro.cli(SweepArguments, args=argv, prog="python -m train sweep")
    path, out = pathlib.Path(args.sweep), pathlib.Path(args.out)
    sweep = load_sweep(path)
    done = 0
    for config in sweep.runs():
        if args.only and config.name not in args.only:
            continue
        if args.data is not None:
            data = dataclasses.replace(config.data, source=args.data)
            config = dataclasses.replace(config, data=data)
        if find_record(read_records(out), config) is not None:
            continue
        if done == args.max_runs:
            break
        print(f"{config.name}, seed {config.seed}", flush=True)
        workdir = pathlib.Path(args.workdir) / path.stem
        record = run_one(config, workdir / f"{config.name}_seed{config.seed}")
        if record is None:
            print("stopped; the same command goes on.")
            return 0
        with user_input(), out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done += 1
    print(summarise(read_records(out)))
    return 0
