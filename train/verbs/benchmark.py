"""`python -m train benchmark`: measure the speed and memory of training and layers."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from train.arguments import parse_options
from train.errors import UsageError, one_of
from train.result import add_result
from train.run.outputs import check_output_file, write_json

_PROG = "python -m train benchmark"
# The suites and their subjects. Each is a module of `train.benchmark`, of the same name
# but for `_MODULES`, with a class `Suite` of its options.
SUITES = {
    "train": "steps and evaluations of networks (the default)",
    "infer": "networks as they are exported, BatchNorm folded",
    "ops": "convolutions, and what stands in for them",
    "accelerator": "all of it that a session on an accelerator needs, timed",
    "checks": "numbers on this device beside float64 on CPU",
    "memory": "peak memory of a process that trains",
    "startup": "seconds to the first step",
    "loop": "what a run adds to its steps",
    "inertial": "tiled convolutions beside dense ones",
    "tucker": "compressed networks beside dense ones",
    "sweep": "a sweep's networks beside each other",
    "compile": "a TPU's compiler's estimates, without a TPU",
}
_MODULES = {"train": "steps"}


def run(argv: Sequence[str]) -> int:
    """Runs a suite, which prints its tables, and writes the record."""
    if any(word.partition("=")[0] == "--model.factory" for word in argv):
        raise UsageError(
            "`model.factory` does nothing with benchmark, whose networks are this "
            "library's; --suite loop --config FILE times a run of the network that "
            "FILE configures, which may be your own."
        )
    name, options = _choose_suite(argv)
    # Only the chosen suite is imported: the imports of a suite take seconds.
    module = importlib.import_module(f"train.benchmark.{_MODULES.get(name, name)}")
    suite = parse_options(module.Suite, options, verb=f"benchmark --suite {name}")
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
    """Returns the suite's name and its options; help without a suite lists them."""
    listed = "\n".join(f"  {name:<12}{words}" for name, words in SUITES.items())
    parser = argparse.ArgumentParser(
        prog=_PROG,
        usage=f"{_PROG} [--suite SUITE] [OPTIONS]",
        description="Measures, in one run and in turn: medians of repeated calls.\n\n"
        f"{listed}\n\n`{_PROG} --suite SUITE --help` lists a suite's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not any(word.startswith("--suite") for word in argv),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--suite", metavar="SUITE", type=one_of(SUITES), default="train"
    )
    chosen, options = parser.parse_known_args(argv)
    return chosen.suite, options
