"""What all faults share: commands that nothing befell, and how an end is judged."""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from program import Process, in_child, on_change
from scenarios import (
    DAMAGED,
    SCENARIOS,
    Scenario,
    checkpoints_in,
    make_given,
    new_folder,
    outcome,
    shorten_quickstart,
)


class Failure(AssertionError):
    """What should not have been; its text says what, and shows the output."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A command that nothing befell.

    Attributes:
        outcome: What it left.
        changes: The path of each change that it made, in order.
        seconds: How long it took.
    """

    outcome: dict[str, Any]
    changes: list[str]
    seconds: float


class Session:
    """Runs commands in folders of their own."""

    def __init__(self, root: pathlib.Path) -> None:
        """Makes what commands read."""
        self.root = root
        self.given = root / "given"
        self.given.mkdir()
        in_child(make_given, self.given)
        fit = SCENARIOS["fit"].words
        self._run_well(("--workdir", "dense"), fit, self.given)
        for name in ("__pycache__", "dense/.lock"):
            place = self.given / name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        self._whole: dict[str, Whole] = {}

    def _run_well(
        self, more: tuple[str, ...], words: tuple[str, ...], folder: pathlib.Path
    ) -> None:
        code, output = Process((*words, *more), folder).end()
        if code != 0:
            raise Failure(f"{words} ends with {code}, and nothing befell it:\n{output}")

    def whole(self, name: str) -> Whole:
        """Returns what a scenario does when nothing befalls it; runs it once.

        What it leaves stays in `done/NAME`, and what it had left after half of its
        changes in `half/NAME`.
        """
        if name in self._whole:
            return self._whole[name]
        # Where all cases run: some files have whole paths in them.
        folder = self.root / "case" / "work"
        new_folder(self.given, folder)
        changes: list[str] = []

        def watch() -> Callable[[], None]:
            prepare(name)
            on_change(folder, lambda number, path: changes.append(_unnumbered(path)))
            file = self.root / f"{name}.json"
            return lambda: file.write_text(json.dumps(changes))

        start = time.monotonic()
        code, output = Process(SCENARIOS[name].words, folder, prepare=watch).end()
        if code != 0:
            raise Failure(f"{name} ends with {code}, and nothing befell it:\n{output}")
        seconds = time.monotonic() - start
        changes = json.loads((self.root / f"{name}.json").read_text())
        self._whole[name] = whole = Whole(
            in_child(outcome, str(folder)), changes, seconds
        )
        self._keep(folder, "done", name)
        kill = killing(folder, len(changes) // 2 + 1)
        prepared = lambda: (prepare(name), kill())[0]  # noqa: E731
        new_folder(self.given, folder)
        Process(SCENARIOS[name].words, folder, prepare=prepared).end()
        self._keep(folder, "half", name)
        return whole

    def _keep(self, folder: pathlib.Path, state: str, name: str) -> None:
        place = self.root / state / name
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)


def _unnumbered(path: str) -> str:
    """Returns a path without the number of the process that it is named by."""
    return re.sub(r"\.partial-[^/]*-\d+", ".partial", path)


def prepare(name: str) -> None:
    """Is called in each process before the program."""
    if name == "quickstart":
        shorten_quickstart()


def killing(folder: pathlib.Path, number: int, *signals: int) -> Callable[[], None]:
    """Returns what has a process killed before a change that it makes.

    Args:
        folder: The directory whose changes are counted.
        number: The number of the change.
        signals: Signals to send instead, one at each change from that one on.
    """

    def act(change: int, path: str) -> None:
        if not signals and change == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 <= change - number < len(signals):
            os.kill(os.getpid(), signals[change - number])

    return lambda: on_change(folder, act)


@dataclasses.dataclass
class Case:
    """A command in a folder of its own, to which something happens.

    Attributes:
        session: What all cases share.
        name: The scenario's name.
        rng: Draws what is drawn.
        folder: The folder.
        caused: How many faults were caused.
    """

    session: Session
    name: str
    rng: random.Random
    folder: pathlib.Path
    caused: int = 0

    @property
    def scenario(self) -> Scenario:
        """The command."""
        return SCENARIOS[self.name]

    @property
    def whole(self) -> Whole:
        """The same, when nothing befalls it."""
        return self.session.whole(self.name)

    def start(
        self,
        *,
        is_fresh: bool = False,
        before: Callable[[], Any] | None = None,
        words: tuple[str, ...] | None = None,
    ) -> Process:
        """Starts the command; `before` is called in its process."""

        def both() -> None:
            prepare(self.name)
            if before is not None:
                before()

        # The short quick start is made in a fork alone.
        return Process(
            words or self.scenario.words,
            self.folder,
            is_fresh=is_fresh and self.name != "quickstart",
            prepare=both,
        )

    def complete(self) -> set[str]:
        """Returns the complete checkpoints; each must be as it was written."""
        from inertia_jax.checkpoint import verify_checkpoint

        found = checkpoints_in(self.folder)
        for path in found:
            try:
                verify_checkpoint(path)
            except ValueError as error:
                raise Failure(f"a checkpoint was harmed: {error}") from error
        return {path.relative_to(self.folder).as_posix() for path in found}

    def check_kept(self, before: set[str]) -> set[str]:
        """Checks that no checkpoint was lost, but those that a later one replaces."""
        after = self.complete()
        for name in before - after:
            run, _, step = name.partition("/checkpoints/")
            later = [n for n in after if n.startswith(f"{run}/checkpoints/")]
            if not step or sum(n > name for n in later) < 2:
                raise Failure(f"the checkpoint {name} was lost; there are {after}")
        return after

    def finish(self) -> str:
        """Runs the command again, which must end as if nothing had befallen it."""
        code, output = self.start().end()
        ending = judge(code, output)
        found = in_child(outcome, str(self.folder))
        if differing := differences(self.whole.outcome, found):
            raise Failure(f"the result differs in {differing[:5]}:\n{output}")
        return "same" if ending == "done" else "refused"


def judge(code: int | None, output: str, *, names: tuple[str, ...] = ()) -> str:
    """Returns `done` or `refused`, which one message says; all else is a failure.

    Args:
        code: The exit code; None: it hung.
        output: What it printed.
        names: What the message must name, one of them at least.
    """
    what = None
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if code is None:
        what = "it hangs"
    elif "Traceback" in output or "Exception ignored" in output:
        what = "there is a traceback"
    elif code not in (0, 2):
        what = f"the exit code is {code}"
    elif (code == 2) != (len(errors) == 1):
        what = f"there are {len(errors)} messages with exit code {code}"
    elif code == 2 and names and not any(name in errors[0] for name in names):
        what = f"the message names none of {', '.join(names)}"
    if what:
        raise Failure(f"{what}:\n{output}")
    return "refused" if code == 2 else "done"


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Returns where two outcomes differ, with what each has there."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted({*expected, *found})
        pairs = [(f"{where}: {k}", expected.get(k), found.get(k)) for k in keys]
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [f"{where}: {len(expected)} and {len(found)} entries"]
        pairs = [
            (f"{where} {i}", *pair)
            for i, pair in enumerate(zip(expected, found, strict=True))
        ]
    else:
        same = expected == found
        return (
            [] if same else [f"{where}: {expected!r:.40}, {found!r:.40}".lstrip(": ")]
        )
    return [what for name, a, b in pairs for what in differences(a, b, name)]


def arrays_of(
    expected: dict[str, Any], found: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of two outcomes, which no damaged line of a log may change.

    Those of a checkpoint that is still damaged, which nothing has read, are left out.
    """
    damaged = {name for name, value in found.items() if DAMAGED in (value or ())}
    kept = {
        name
        for name in {*expected, *found} - damaged
        if name.endswith(("arrays", ", last"))
    }
    return tuple({n: o.get(n) for n in kept} for o in (expected, found))


def some_of(values: list[Any], rng: random.Random) -> Iterator[Any]:
    """Yields values in an order that is drawn, and then again."""
    while values:
        yield from rng.sample(values, len(values))
