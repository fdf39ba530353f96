"""`python -m train benchmark`: measure the speed and memory of networks and layers."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from train.arguments import parse_options
from train.command import program
from train.errors import UsageError, one_of
from train.result import add_result
from train.run.outputs import check_output_file, write_json

# The suites and their subjects. Each is a module of `train.benchmark`, of the same name
# but for `_MODULES`, with a class `Suite` of its options.
SUITES = {
    "checkpoints": "your own networks, beside each other and in other programs",
    "train": "steps and evaluations of networks (the default)",
    "infer": "networks as they are exported, BatchNorm folded",
    "ops": "convolutions, and what stands in for them",
    "accelerator": "all of it that a session on an accelerator needs, timed",
    "checks": "numbers on this device beside float64 on CPU",
    "memory": "peak memory of a process that trains",
    "startup": "seconds to the first step",
    "loop": "what a run adds to its steps",
    "inertial": "tiled convolutions beside dense ones",
    "tiles": "where tiles pay: one layer over sides, channels, tiles",
    "tucker": "compressed networks beside dense ones",
    "sweep": "a sweep's networks beside each other",
    "compile": "a TPU's compiler's estimates, without a TPU",
}
_MODULES = {"train": "steps"}


def run(argv: Sequence[str]) -> int:
    """Runs a suite, which prints its tables, and writes the record."""
    name, options = _choose_suite(argv)
    if name != "checkpoints":
        _check_suite(name, options)
    # Only the chosen suite is imported: the imports of a suite take seconds.
    module = importlib.import_module(f"train.benchmark.{_MODULES.get(name, name)}")
    verb = "benchmark" if name == "checkpoints" else f"benchmark --suite {name}"
    suite = parse_options(module.Suite, options, verb=verb)
    for option in ("repeats", "batch_size", "steps"):
        value = getattr(suite, option, 1)
        if value < 1:
            raise UsageError(f"`{option}` (={value}) must be >= 1.")
    check_output_file("out", suite.out)
    rows: list[dict[str, Any]] = []
    for row in suite.rows():
        rows.append(row)
        # What is measured is kept, whatever becomes of the rest.
        write_json(suite.out, suite.record(rows))
    add_result(suite.record(rows))
    return 0


def _choose_suite(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the suite's name and its options; help without a suite lists them.

    Without a name it is `checkpoints` if a word comes before all options.
    """
    has_word = bool(argv) and not argv[0].startswith("-")
    listed = "\n".join(f"  {name:<12}{words}" for name, words in SUITES.items())
    prog = f"{program()} benchmark"
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} CHECKPOINT [CHECKPOINT ...] [OPTIONS]\n"
        f"       {prog} [--suite SUITE] [OPTIONS]",
        description="Measures, in one run and in turn: medians of repeated calls.\n"
        "Checkpoints before all options are timed as they are deployed.\n\n"
        f"{listed}\n\n`{prog} --suite SUITE --help` lists a suite's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not (has_word or any(word.startswith("--suite") for word in argv)),
        allow_abbrev=False,
    )
    default = "checkpoints" if has_word else "train"
    parser.add_argument(
        "--suite", metavar="SUITE", type=one_of(SUITES), default=default
    )
    chosen, options = parser.parse_known_args(argv)
    return chosen.suite, options


def _check_suite(name: str, options: Sequence[str]) -> None:
    """Raises UsageError where a suite is given what `checkpoints` takes alone."""
    if any(word.partition("=")[0] == "--model.factory" for word in options):
        raise UsageError(
            f"`model.factory` does nothing with --suite {name}; `{program()} benchmark "
            f"CHECKPOINT` times networks of your own, and --suite loop --config FILE "
            f"times a run."
        )
    if options and not options[0].startswith("-"):
        raise UsageError(
            f"{options[0]} does nothing with --suite {name}; `{program()} benchmark "
            f"CHECKPOINT`, without a suite, times checkpoints."
        )
