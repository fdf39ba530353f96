"""`python -m train sweep`: train many runs, and record each."""

import pathlib
import sys
from collections.abc import Sequence

from train.errors import DivergedError, UsageError, user_input
from train.experiments.sweep import (
    append_record,
    find_record,
    load_sweep,
    make_failed_record,
    make_sweep_record,
    read_records,
    summarise,
    with_source,
)
from train.fit.loop import exit_code, fit
from train.options.sweep import parse
from train.result import add_result


def run(argv: Sequence[str]) -> int:
    """Trains the missing runs and prints the table; returns 1 if one diverged."""
    args = parse(argv)
    path, out = pathlib.Path(args.sweep), pathlib.Path(args.out)
    sweep = load_sweep(path)
    names = [config.name for config in sweep.configs]
    unknown = sorted(set(args.only) - set(names))
    if unknown:
        raise UsageError(f"`only` has {unknown}; must be among {names}.")
    if args.max_runs is not None and args.max_runs < 1:
        raise UsageError(f"`max_runs` (={args.max_runs}) must be >= 1.")
    with user_input(), out.open("a"):
        pass  # shows, before hours of training, that the file can be written
    done, failed = 0, False
    for config in sweep.runs():
        if args.only and config.name not in args.only:
            continue
        config = with_source(config, args.data)
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
                append_record(out, make_failed_record(config, error), workdir=workdir)
            failed, done = True, done + 1
            continue
        if result.evaluation is None:
            print(f"stopped at step {result.step}; the same command goes on.")
            return exit_code(result)
        record = make_sweep_record(config, workdir, result.evaluation)
        with user_input():
            append_record(out, record, workdir=workdir)
        done += 1
    print(summarise(read_records(out)))
    add_result({"records": read_records(out)})
    return 1 if failed else 0
