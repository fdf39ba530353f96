"""Seconds from the command to the first step, with and without compiled programs."""

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import train
from train.benchmark.suite import BaseSuite
from train.errors import UsageError

_ROOT = pathlib.Path(train.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Seconds from the command to the first step."""

    repeats: int = 9
    """Number of rounds: a start with an empty compilation cache, and one that finds it
    filled."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Starts the quick start's training again and again, up to its first step.

        Raises:
            UsageError: A start fails; the message is what it printed.
        """
        times: dict[str, list[float]] = {"cold": [], "cached": []}
        for _ in range(self.repeats):
            with tempfile.TemporaryDirectory() as scratch:
                place = pathlib.Path(scratch)
                for name, starts in times.items():
                    starts.append(_seconds_to_first_step(place / name, place / "cache"))
        row = {}
        for name, starts in times.items():
            median = statistics.median(starts)
            print(f"first step, {name}: {median:.1f} s after the command")
            row[name] = {"median_s": median, "min_s": min(starts), "max_s": max(starts)}
        yield row


def _seconds_to_first_step(workdir: pathlib.Path, cache: pathlib.Path) -> float:
    arguments = ["fit", "--config", "configs/quickstart.py", "--workdir", str(workdir)]
    output = workdir.with_suffix(".txt")
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    metrics = workdir / "metrics.jsonl"
    start = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", *arguments, "--log-steps", "1"],
            cwd=_ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise UsageError(f"the run ended early: {output.read_text()}")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
