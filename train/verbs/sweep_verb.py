"""`python -m train sweep`: many runs, one record a run."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.errors import DivergedError, UsageError, user_input
from train.loop import exit_code, fit
from train.sweep import (
    append_record,
    find_record,
    load_sweep,
    make_failed_record,
    make_sweep_record,
    read_records,
    summarise,
)


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
    """Runs what is missing and prints the table so far; 1: one of them diverged."""
    args = tyro.cli(SweepArguments, args=argv, prog="python -m train sweep")
    path, out = pathlib.Path(args.sweep), pathlib.Path(args.out)
    sweep = load_sweep(path)
    names = [config.name for config in sweep.configs]
    unknown = sorted(set(args.only) - set(names))
    if unknown:
        raise UsageError(f"`only` has {unknown}; must be among {names}.")
    if args.max_runs is not None and args.max_runs < 1:
        raise UsageError(f"`max_runs` (={args.max_runs}) must be >= 1.")
    with user_input(), out.open("a"):
        pass  # before hours of training: the file can be written
    done, failed = 0, False
    for config in sweep.runs():
        if args.only and config.name not in args.only:
            continue
        if args.data is not None:
            data = dataclasses.replace(config.data, source=args.data)
            config = dataclasses.replace(config, data=data)
        known = find_record(read_records(out), config)
        if known is not None:
            failed = failed or "failed" in known
            continue
        if done == args.max_runs:
            break
        print(f"{config.name}, seed {config.seed}", flush=True)
        workdir = pathlib.Path(args.workdir) / path.stem
        workdir = workdir / f"{config.name}_seed{config.seed}"
        try:
            result = fit(config, workdir=workdir, resume=True)
        except DivergedError as error:
            print(f"error: {error}", file=sys.stderr)
            with user_input():
                append_record(out, make_failed_record(config, error))
            failed, done = True, done + 1
            continue
        if result.evaluation is None:
            print(f"stopped at step {result.step}; the same command goes on.")
            return exit_code(result)
        record = make_sweep_record(config, workdir, result.evaluation)
        with user_input():
            append_record(out, record)
        done += 1
    print(summarise(read_records(out)))
    return 1 if failed else 0
