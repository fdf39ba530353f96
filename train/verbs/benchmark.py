"""`python -m train benchmark`: measure steps, the loop around them, and layers."""

import argparse
import importlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from train.errors import UsageError, user_input
from train.run.directory import describe_machine
from train.run.outputs import check_output_file

_PROG = "python -m train benchmark"
# The module whose `Suite` holds the options and measures, and what that is.
SUITES = {
    "train": (
        "train.benchmark.steps",
        "steps and evaluations of networks (the default)",
    ),
    "infer": (
        "train.benchmark.infer",
        "networks as they are exported, BatchNorm folded",
    ),
    "ops": ("train.benchmark.ops", "convolutions, and what stands in for them"),
    "memory": ("train.benchmark.memory", "peak memory of a process that trains"),
    "startup": ("train.benchmark.startup", "seconds to the first step"),
    "loop": ("train.benchmark.loop", "what a run adds to its steps"),
    "inertial": ("train.benchmark.inertial", "tiled convolutions beside dense ones"),
    "tucker": ("train.benchmark.tucker", "compressed networks beside dense ones"),
    "sweep": ("train.benchmark.sweep", "a sweep's networks beside each other"),
}


def run(argv: Sequence[str]) -> int:
    """Measures as the arguments say, and prints a table."""
    name, options = _choose_suite(argv)
    # Imported by need: a suite's own imports take seconds.
    kind: Any = importlib.import_module(SUITES[name][0]).Suite
    suite = tyro.cli(kind, args=options, prog=f"{_PROG} --suite {name}")
    for option in ("repeats", "batch_size", "steps"):
        value = getattr(suite, option, 1)
        if value < 1:
            raise UsageError(f"`{option}` (={value}) must be >= 1.")
    check_output_file("out", suite.out)
    rows = list(suite.rows())
    if suite.out is not None:
        with user_input():
            record = {"machine": describe_machine(), "rows": rows}
            pathlib.Path(suite.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _choose_suite(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the suite's name and its options; help without a suite lists them."""
    listed = "\n".join(f"  {name:<10}{words}" for name, (_, words) in SUITES.items())
    parser = argparse.ArgumentParser(
        prog=_PROG,
        usage=f"{_PROG} [--suite SUITE] [OPTIONS]",
        description="Measures, in one run and in turn: medians of repeated calls.\n\n"
        f"{listed}\n\n`{_PROG} --suite SUITE --help` lists a suite's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not any(word.startswith("--suite") for word in argv),
        allow_abbrev=False,
    )
    parser.add_argument("--suite", metavar="SUITE", choices=SUITES, default="train")
    chosen, options = parser.parse_known_args(argv)
    return chosen.suite, options
