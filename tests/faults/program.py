"""Starts the program in processes of its own, of which something may be prepared.

Most are forks of one process that has imported everything and has not yet begun to
compute, so that a start costs a tenth of what it does a user. Others are as a user
starts them, so that faults come among the imports, too.
"""

import importlib
import json
import os
import pathlib
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# Seconds after which a process hangs, whatever else the machine does meanwhile.
MOST_SECONDS = 240.0

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def import_all() -> None:
    """Imports what the program does when a verb is called."""
    import inertia_jax.chips.compiler  # noqa: F401
    import train.machine.platform  # noqa: F401
    from train.__main__ import _MODULES, VERBS

    for verb in VERBS:
        importlib.import_module(f"train.verbs.{_MODULES.get(verb, verb)}")


class Process:
    """A process of the program, whose output goes to a file."""

    def __init__(
        self,
        words: Sequence[str],
        folder: pathlib.Path,
        *,
        is_fresh: bool = False,
        prepare: Callable[[], Any] | None = None,
    ) -> None:
        """Starts `python -m train WORDS` in a folder.

        Args:
            words: The verb and its options.
            folder: The directory in which it runs.
            is_fresh: Start it as a user does, not as a fork.
            prepare: Is called in the process before the program.
        """
        self._log = tempfile.TemporaryFile()
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _enter(self._log.fileno(), folder)
            _end_with(lambda: _program([*words, "--no-huge-pages"], is_fresh, prepare))
        self._handle = os.pidfd_open(self.pid)

    def wait(self, seconds: float = MOST_SECONDS) -> bool:
        """Returns whether it ends within so many seconds."""
        if self._code is None and select.select([self._handle], [], [], seconds)[0]:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._handle)
        return self._code is not None

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if not self.wait(0):
            os.kill(self.pid, number)

    def end(self) -> tuple[int | None, str]:
        """Returns its exit code and output; None: it hung, and was killed."""
        hung = not self.wait()
        if hung:
            self.send(signal.SIGKILL)
            self.wait()
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self._log.close()
        return None if hung else self._code, text


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function computes in a process of its own, as JSON."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile("w+") as result:
        pid = os.fork()
        if pid == 0:

            def call() -> int:
                json.dump(function(*arguments), result)
                result.flush()
                return 0

            _enter(log.fileno(), pathlib.Path.cwd())
            _end_with(call)
        handle = os.pidfd_open(pid)
        if not select.select([handle], [], [], MOST_SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(handle)
        if os.waitpid(pid, 0)[1]:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-2000:])
        result.seek(0)
        return json.load(result)


def on_change(folder: pathlib.Path, act: Callable[[int, str], None]) -> None:
    """Calls `act` before each change that Python makes below a folder.

    It is given the number of the change, from 1, and the path.
    """
    numbers = _count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            is_change = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        elif event in _CHANGES:
            path, is_change = arguments[0], True
        else:
            return
        if is_change and isinstance(path, str | os.PathLike):
            place = os.path.abspath(os.fspath(path))
            # What is removed with its directory is named by its last part alone.
            if place.startswith(f"{folder}{os.sep}"):
                act(next(numbers), os.path.relpath(place, folder))

    sys.addaudithook(hook)


def _count() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def _enter(log: int, folder: pathlib.Path) -> None:
    """Makes a fork what a shell starts: its signals, its streams, its directory."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())


def _program(
    words: list[str], is_fresh: bool, prepare: Callable[[], Any] | None
) -> int:
    finish = None if prepare is None else prepare()
    if is_fresh:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-m", "train", *words], env)
    from train.__main__ import _run

    sys.argv = ["train", *words]
    code = _run()
    if finish is not None:
        finish()
    return code


def _end_with(call: Callable[[], int]) -> None:
    """Ends this process with an exit code, and what it printed written."""
    code = 1
    try:
        code = call()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def seconds_of_children() -> float:
    """Returns the seconds of the processor that ended processes have taken."""
    times = os.times()
    return times.children_user + times.children_system + time.process_time()
