"""Seconds from the command to the first step, with and without compiled programs."""

import dataclasses
import os
import pathlib
import pty
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable
from typing import Any, Literal

import train
from train.benchmark.suite import BaseSuite
from train.errors import UsageError
from train.machine.host_memory import NO_HUGE_PAGES

_ROOT = pathlib.Path(train.__file__).parents[1]
_CONFIG = ("--config", "configs/quickstart.py")
# Beside the workdir or checkpoint, what a verb is given.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "fit": _CONFIG,
    "finetune": ("--epochs", "1"),
    "evaluate": (),
}
# What a verb prints before its first step is compiled, and after it is taken.
_MARKS = {"evaluate": ("evaluating on", "top-1")}
_TRAINING_MARKS = ("compiling the first step", "acc=")
_MOMENTS = ("compiling", "first step")
_CACHES = ("cold", "cached")
# Seconds of the processor and of the clock.
Seconds = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Seconds from the command to the first step, of the quick start's network."""

    verbs: tuple[Literal["quickstart", "fit", "finetune", "evaluate"], ...] = (
        "quickstart",
        "fit",
        "finetune",
        "evaluate",
    )
    """Verbs to start."""
    repeats: int = 9
    """Number of rounds: a start with an empty compilation cache, and one that finds it
    filled."""
    against: str | None = None
    """Another checkout of this project, whose starts take turns with this one's."""
    small_pages: bool = False
    """Whether starts without huge pages of memory take turns with the others."""

    def cases(self) -> Iterable[str]:
        return self.verbs

    def measure(self, case: str) -> dict[str, Any]:
        """Starts a verb again and again, up to its first step.

        Raises:
            UsageError: A start fails; the message is what it printed.
        """
        sides: dict[str, tuple[pathlib.Path, tuple[str, ...]]] = {"here": (_ROOT, ())}
        if self.against is not None:
            sides["against"] = (pathlib.Path(self.against).resolve(), ())
        if self.small_pages:
            sides["small pages"] = (_ROOT, (NO_HUGE_PAGES,))
        starts: dict[str, list[dict[str, Seconds]]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            place = pathlib.Path(scratch)
            run = place / "run"
            if case in ("finetune", "evaluate"):
                _train_one_epoch(run, place / "cache_of_run")
            for number in range(self.repeats):
                for side, (root, options) in sides.items():
                    for cache in _CACHES:
                        name = f"{number}_{side}_{cache}"
                        command = [case, *_ARGUMENTS[case], *options]
                        if case in ("finetune", "evaluate"):
                            command.insert(1, str(run))
                        if case != "evaluate":
                            command += ["--workdir", str(place / name)]
                        marks = _MARKS.get(case, _TRAINING_MARKS)
                        caches = place / f"{number}_{side}_cache"
                        found = _start(command, root=root, caches=caches, marks=marks)
                        starts.setdefault(f"{side}, {cache}", []).append(found)
        return {"verb": case, **{name: _medians(all_) for name, all_ in starts.items()}}

    def describe(self, row: dict[str, Any]) -> str:
        lines = []
        for name, moments in row.items():
            if name == "verb":
                continue
            for moment, seconds in moments.items():
                cpu, wall = seconds["cpu_s"], seconds["wall_s"]
                lines.append(
                    f"{row['verb']:<10} {name:<24} {moment:<10} after "
                    f"{cpu['median']:6.2f} s of CPU, {wall['median']:6.2f} s"
                )
        return "\n".join(lines)


def _train_one_epoch(workdir: pathlib.Path, caches: pathlib.Path) -> None:
    """Trains the quick start's network for an epoch, for verbs that need a run."""
    command = ["fit", *_CONFIG, "--epochs", "1", "--workdir", str(workdir)]
    _start(command, root=_ROOT, caches=caches, marks=("checkpoints  ",))


def _start(
    command: list[str],
    *,
    root: pathlib.Path,
    caches: pathlib.Path,
    marks: tuple[str, ...],
) -> dict[str, Seconds]:
    """Starts a verb, ends it at the last mark, and returns the seconds to each.

    It has a terminal, on which the progress is shown at once. A mark that an older
    version does not print is left out, but for the last.

    Raises:
        UsageError: The verb ends before the last mark.
    """
    env = {**os.environ, "XDG_CACHE_HOME": str(caches)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    output, terminal = pty.openpty()
    # On a terminal of no size, as a new one is, tqdm shows no bar from version 4.70 on.
    termios.tcsetwinsize(terminal, (50, 200))
    start, printed = time.perf_counter(), ""
    found: dict[str, Seconds] = {}
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *command],
        cwd=root,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        while marks[-1] not in printed:
            try:
                text = os.read(output, 4096)
            except OSError:  # the program has ended
                raise UsageError(f"{command} ended early: {printed}") from None
            printed += text.decode(errors="replace")
            now = (_cpu_seconds(process.pid), time.perf_counter() - start)
            for moment, mark in zip(_MOMENTS[-len(marks) :], marks, strict=True):
                if mark in printed:
                    found.setdefault(moment, now)
        return found
    finally:
        process.kill()
        process.wait()
        os.close(output)


def _cpu_seconds(process_id: int) -> float:
    """Returns the seconds that a process has computed for, on all cores, on Linux."""
    text = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    # After the name, which may have spaces; the 14th and 15th field of proc(5).
    ticks = text.rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _medians(starts: list[dict[str, Seconds]]) -> dict[str, Any]:
    """Returns median, least and most of the seconds to each moment."""
    return {
        moment: {
            kind: {
                "median": statistics.median(seconds),
                "min": min(seconds),
                "max": max(seconds),
            }
            for kind, seconds in zip(
                ("cpu_s", "wall_s"),
                zip(*(start[moment] for start in starts), strict=True),
                strict=True,
            )
        }
        for moment in starts[0]
    }
