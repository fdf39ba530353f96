"""All that a session on an accelerator has to show, in a few minutes, part by part."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from train.benchmark.suite import BaseSuite
from train.run.directory import this_command
from train.run.lines import read_metrics

Part = Literal["checks", "train", "infer", "recipe", "memory"]
_RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "cifar10_resnet18_fast.py"
_NETWORKS = ("resnet18", "vgg16", "simpledla")
# The batch sizes of evaluations, beside 1.
_BATCHES = (256, 1024)
_TAIL = 15


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Checks, speed, a training to 94% and memory, each in a program of its own.

    A part that fails or takes too long leaves the others alone, and every part is
    recorded as soon as it is done.
    """

    minutes: float = 10
    """Minutes for all parts together; parts that find no time left are not begun."""
    skip: tuple[Part, ...] = ()
    """Parts to leave out."""
    data: str | None = None
    """CIFAR-10 for the training, such as npz:PATH; None: this part is left out."""
    epochs: int | None = None
    """Number of epochs of the training; None: as its configuration says."""
    width: float = 1.0
    """Width of the networks, but for those of the checks."""
    batch_size: int = 512
    """Number of images a training step."""
    against: Literal["none", "torch"] = "none"
    """torch: steps and evaluations are timed in PyTorch, too."""
    repeats: int = 9
    """Number of timed calls of each function."""

    def rows(self) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + 60 * self.minutes
        for name, arguments in self._parts():
            if name.split()[0] in self.skip:
                continue
            print(f"measuring {name}", file=sys.stderr, flush=True)
            row = run_part(name, arguments, seconds=end - time.monotonic())
            print(self.describe(row), flush=True)
            yield row

    def machine(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # This program leaves the accelerator to those that it starts.
        found: Any = next((row["machine"] for row in rows if "machine" in row), {})
        return {**found, "command": this_command()}

    def describe(self, row: dict[str, Any]) -> str:
        found = "".join(f"\n{line}" for line in row["said"])
        return f"{row['part']}: {row['outcome']} after {row['seconds']:.0f} s{found}"

    def _parts(self) -> Iterator[tuple[str, list[str]]]:
        """Returns names and arguments of the programs, the most wanted first."""
        timed = ["--against", self.against, "--repeats", str(self.repeats)]
        wide = ["--width", str(self.width)]
        yield "checks", ["benchmark", "--suite", "checks"]
        for model in _NETWORKS:
            yield (
                f"train {model}",
                [
                    *("benchmark", "--suite", "train", "--models", model, *wide),
                    *("--dtype", "bfloat16", "--batch-size", str(self.batch_size)),
                    *timed,
                ],
            )
        if self.data is not None:
            epochs = [] if self.epochs is None else ["--epochs", str(self.epochs)]
            yield (
                "recipe",
                [
                    *("fit", "--config", str(_RECIPE), "--data", self.data),
                    *("--model.width", str(self.width), *epochs),
                ],
            )
        for size in _BATCHES:
            yield (
                f"infer {size}",
                [
                    *("benchmark", "--suite", "infer", "--models", "resnet18", *wide),
                    *("--batch-size", str(size), *timed),
                ],
            )
        yield (
            "memory",
            [
                *("benchmark", "--suite", "memory", "--models", "resnet18", *wide),
                *("--batch-size", str(self.batch_size), "--against", self.against),
            ],
        )


def run_part(name: str, arguments: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """Runs `python -m train` with arguments, and returns its row of the record.

    Args:
        name: The name of the part.
        arguments: A verb with its options.
        seconds: The seconds after which the program is stopped.
    """
    row: dict[str, Any] = {"part": name, "arguments": list(arguments), "said": []}
    if seconds <= 0:
        return {**row, "outcome": "not begun", "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        record, workdir = place / "record.json", place / "run"
        is_benchmark = arguments[0] == "benchmark"
        out = ["--out", str(record)] if is_benchmark else ["--workdir", str(workdir)]
        start = time.monotonic()
        with (place / "said").open("w+") as said:
            try:
                code = subprocess.run(
                    [sys.executable, "-m", "train", *arguments, *out],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    check=False,
                ).returncode
                row["outcome"] = "failed" if code else "done"
            except subprocess.TimeoutExpired:
                row["outcome"] = "stopped"
            row["seconds"] = time.monotonic() - start
            said.seek(0)
            lines = said.read().splitlines()
        row["said"] = lines if row["outcome"] == "done" else lines[-_TAIL:]
        if record.exists():
            row |= json.loads(record.read_text())
        if workdir.exists():
            row["rows"] = [
                line
                for line in read_metrics(workdir / "metrics.jsonl")
                if line["kind"] in ("epoch", "test")
            ]
    return row
