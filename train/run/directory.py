"""The directory of a run: its configuration, its metrics, how it was made."""

import errno
import fcntl
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from inertia_jax.atomic import appearing, local_path
from train.command import shell_command
from train.config import Config
from train.config_file import (
    config_to_json,
    differing_fields,
    fill_defaults,
    flat_config,
    without_places,
)
from train.errors import UsageError, in_words, user_input
from train.machine.host_memory import malloc_tunables
from train.run.events import Events
from train.run.lines import (
    Log,
    put_aside_unreadable,
    read_metrics,
    read_starts,
    write_lines,
)
from train.run.outputs import check_output
from train.run.wandb_log import WandbLog
from train.versions import package_versions

_NO_REGULAR_FILE = "no regular file; remove it"

# The fields that say how long a run goes on, and that a resumed run may change.
_LENGTH = {"epochs", "early_stopping"}

# The files of a run's directory.
_FILES = {
    *("config.json", "run.jsonl", "metrics.jsonl"),
    *("tensorboard", "checkpoints", "wandb"),
}


def this_command() -> str:
    """Returns the command that this program was started by."""
    return shlex.join(["python", "-m", "train", *sys.argv[1:]])


def describe_machine() -> dict[str, Any]:
    """Returns hardware, versions and the command, as records hold them."""
    device = jax.devices()[0]
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    settings = {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "GLIBC_TUNABLES": malloc_tunables(),
    }
    cpu = re.search(r"^model name\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return {
        "command": this_command(),
        "backend": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "num_cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": package_versions(),
        # The settings of XLA and malloc, by the user or by the program.
        "environment": {name: value for name, value in settings.items() if value},
    }


class RunDirectory:
    """A run's configuration, starts, metrics, TensorBoard events and checkpoints.

    With several processes, only the first writes.
    """

    def __init__(self, path: pathlib.Path, config: Config, *, resume: bool) -> None:
        """Opens the directory of a run, new or to be resumed.

        Raises:
            UsageError: It holds another run, or this one and `resume` is false, or it
                cannot be written.
        """
        with user_input():
            path = local_path(path)
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = Log(path / "metrics.jsonl")
        self._events: Events | None = None
        self._wandb: WandbLog | None = None
        self._learning_rate: Callable[[int], float] | None = None
        self._lock: IO[str] | None = None
        self._is_writer = jax.process_index() == 0
        self._config = config
        if self._is_writer:
            check_output("workdir", path)
        with user_input():
            self._check(resume=resume)

    def _check(self, *, resume: bool) -> None:
        path = self.path
        config_file = path / "config.json"
        # A run that saved no checkpoint may be replaced: nothing is lost.
        self._is_new = not self.has_checkpoints
        if config_file.is_file() and not self._is_new:
            differing = self._differing_fields(config_file)
            if differing and not (
                resume and self._is_lengthened(config_file, differing)
            ):
                listed = "\n  ".join(differing)
                raise UsageError(
                    f"{path} holds a run with another config; nothing was changed. "
                    f"Choose another --workdir, or undo:\n  {listed}"
                    f"{self._longer(config_file, differing)}"
                )
            if not resume:
                raise UsageError(
                    f"{path} holds this run already; --resume goes on with it, another "
                    f"--workdir starts a new one. Nothing was changed."
                )
        elif path.exists() and not (is_empty_directory(path) or self._is_begun()):
            raise UsageError(f"{path} exists and holds no run; nothing was changed.")

    def _differing_fields(self, config_file: pathlib.Path) -> list[str]:
        left = (
            f"Nothing was changed. The checkpoints beside it are left: "
            f"`{shell_command('finetune')}` trains one further, with another --workdir."
        )
        try:
            there = read_json(config_file)
        except UsageError as error:
            raise UsageError(f"{error} {left}") from error
        try:
            if isinstance(there, dict):
                there = fill_defaults(there, config_to_json(Config()))
                here = config_to_json(self._config)
                if not self._is_writer:  # whose machine may have data elsewhere
                    there = without_places(there, has_names=False)
                    here = without_places(here, has_names=False)
                return differing_fields(there, here)
        except RecursionError:  # lists in lists, a thousand deep
            pass
        raise UsageError(f"{config_file} holds no configuration. {left}")

    def _is_lengthened(
        self, config_file: pathlib.Path, differing: Sequence[str]
    ) -> bool:
        """Returns whether the run is to go on for longer, its past being the same."""
        names = {line.partition(":")[0] for line in differing}
        epochs = read_json(config_file).get("epochs")
        if not (names <= _LENGTH and isinstance(epochs, int)):
            return False
        is_made_for_epochs = self._config.optimizer.is_made_for_epochs
        if self._config.epochs == epochs:
            return True
        return self._config.epochs > epochs and not is_made_for_epochs

    def _longer(self, config_file: pathlib.Path, differing: Sequence[str]) -> str:
        """Returns the way to a longer run.

        It is "" unless more epochs were asked for, and nothing else.
        """
        if {line.partition(":")[0] for line in differing} - _LENGTH:
            return ""
        if self._is_lengthened(config_file, differing):
            return f"\n--resume goes on with it until epoch {self._config.epochs}."
        epochs = read_json(config_file).get("epochs")
        if not isinstance(epochs, int) or self._config.epochs <= epochs:
            return ""
        more = (
            f"\nIts learning rates were made for {epochs} epochs "
            f"(`optimizer.schedule` is {self._config.optimizer.schedule}): with "
            f"{self._config.epochs}, those of its first epochs would have been others, "
            f"so that it is a new run."
        )
        ended = [row.get("epoch") for row in read_metrics(self.path / "metrics.jsonl")]
        if epochs not in ended:
            return more
        rest = str(self._config.epochs - epochs)
        return (
            f"{more} This trains its best checkpoint further:\n"
            f"{shell_command('finetune', self.path, '--epochs', rest)}"
        )

    def _is_begun(self) -> bool:
        """Returns whether only a run lies here, not another program's `config.json`."""
        if not (self.path / "config.json").is_file():
            return False
        names = {p.name for p in self.path.iterdir() if not p.name.startswith(".")}
        if not names <= _FILES:
            return False
        config = read_json(self.path / "config.json")
        return isinstance(config, dict) and set(config) <= set(config_to_json(Config()))

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run has saved any, damaged ones included."""
        return any(
            any(self.checkpoints.glob(names)) for names in ("step_*", "damaged_step_*")
        )

    def lock(self) -> None:
        """Makes the directory and keeps other runs out of it while this one lives.

        Raises:
            UsageError: Another process trains here, or the disk cannot be written.
        """
        if jax.process_count() > 1:
            # All processes have looked at the directory before the first changes it.
            multihost_utils.sync_global_devices("run directory")
        if not self._is_writer:
            return
        with user_input():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _open_lock(self.path / ".lock")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UsageError(f"another process is training in {self.path}.") from error
        except OSError as error:  # a file system without locks
            print(
                f"warning: cannot keep other runs out of {self.path}: "
                f"{in_words(error)}.",
                file=sys.stderr,
            )
        if self._is_new and self.has_checkpoints:
            self._lock.close()
            raise UsageError(f"another run was in {self.path} meanwhile.")

    def open(
        self,
        step: int,
        *,
        learning_rate: Callable[[int], float] | None = None,
        wandb: bool = False,
    ) -> None:
        """Begins to write, after `step`: later lines of metrics are dropped.

        Args:
            step: The number of steps taken.
            learning_rate: The learning rate of each step, counted from 1, which lines
                of metrics have; None: they do not have it.
            wandb: Whether metrics also go to Weights & Biases.

        Raises:
            UsageError: A file cannot be written, or wandb cannot begin.
        """
        if not self._is_writer:
            return
        self._learning_rate = learning_rate
        started = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step}
        starts, metrics = self.path / "run.jsonl", self.path / "metrics.jsonl"
        with user_input():
            for log in (starts, metrics):
                put_aside_unreadable(log)
                if self._is_new:
                    log.unlink(missing_ok=True)
            if self._is_new:
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            config = json.dumps(config_to_json(self._config), indent=1)
            write_whole(self.path / "config.json", config)
            start = {**started, **describe_machine()}
            write_lines(starts, [*read_starts(starts), start])
            rows = [row for row in read_metrics(metrics) if row["step"] <= step]
            if metrics.exists():
                write_lines(metrics, rows)
            self._events = Events(self.path / "tensorboard", step, rows)
        if step == 0:
            hyperparameters = flat_config(self._config)
            self._events.show(0, lambda make: _hyperparameters(make, hyperparameters))
        if wandb:
            self._wandb = WandbLog(
                self.path,
                name=self._config.name,
                config=config_to_json(self._config),
                started=read_starts(starts)[0]["started"],
            )

    def log(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds a line of metrics, of kind `train`, `epoch`, `validation` or `test`."""
        if self._events is None:
            return
        if self._learning_rate is not None:
            metrics = {**metrics, "learning_rate": self._learning_rate(step)}
        # In seconds since 1970, as TensorBoard has it.
        now = {"time": round(time.time(), 3)}
        self._metrics.add({"step": step, "kind": kind, **now, **metrics})
        self._events.add(step, kind, metrics)
        if self._wandb is not None:
            self._wandb.add(step, kind, metrics)

    def show_images(self, step: int, tag: str, images: np.ndarray) -> None:
        """Shows images, uint8 [n, h, w, c], c being 1 or 3, beside each other."""
        if self._events is not None:
            row = np.concatenate(list(images), axis=1)
            self._events.show(
                step, lambda make: [make.image(tag, row, dataformats="HWC")]
            )

    def show_histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Shows how numbers are distributed, by tag."""
        if self._events is not None and values:
            self._events.show(
                step,
                lambda make: [
                    make.histogram(tag, np.ravel(array), _bins(array))
                    for tag, array in values.items()
                ],
            )

    def close(self) -> None:
        """Writes out what is buffered, and lets other runs have the directory."""
        try:
            if self._events is not None:
                self._metrics.close()
                self._events.close()
            if self._wandb is not None:
                self._wandb.close()
        finally:
            if self._lock is not None:
                self._lock.close()


def _bins(values: np.ndarray) -> str | list[float]:
    """Returns the bins of a histogram, as NumPy takes them.

    NumPy refuses to make bins around one number as large as the threshold of a layer
    whose gates are all closed, 1e30.
    """
    low, high = float(values.min()), float(values.max())
    if low < high:
        return "auto"
    half = max(0.5, 1e-6 * abs(low))
    return [low - half, low + half]


def _hyperparameters(make: Any, values: dict[str, Any]) -> list[Any]:
    """Returns TensorBoard's summaries of hyperparameters, beside test accuracy."""
    rows = "".join(f"|{name}|{value}|\n" for name, value in values.items())
    return [
        *make.hparams(values, {"test/top1": 0.0}),
        make.text("config", f"|option|value|\n|-|-|\n{rows}"),
    ]


def _open_lock(path: pathlib.Path) -> IO[str]:
    """Opens a file to lock, whose content stays, or makes it.

    Raises:
        OSError: Something else lies there, such as a link, or a pipe.
    """
    # A link is not followed, and a pipe not waited for.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise OSError(error.errno, _NO_REGULAR_FILE, str(path)) from error
    if stat.S_ISREG(os.fstat(number).st_mode):
        return os.fdopen(number, "r+")
    os.close(number)
    raise OSError(errno.EINVAL, _NO_REGULAR_FILE, str(path))


def read_json(path: pathlib.Path) -> Any:
    """Reads a file of JSON.

    Raises:
        UsageError: The file cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(in_words(error)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}.") from error


def is_empty_directory(path: pathlib.Path) -> bool:
    """Returns whether a directory holds nothing but hidden files."""
    # A run that was killed at its start may have left hidden files.
    return path.is_dir() and all(p.name.startswith(".") for p in path.iterdir())


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    # As `write_lines`: one process writes, and through no link.
    with appearing(path, writer="run", through_links=False) as partial:
        partial.write_text(text)
