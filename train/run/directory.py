"""The directory of a run: its configuration, its metrics, how it was made."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import sys
import time
from typing import IO, Any

import jax
from jax.experimental import multihost_utils

import inertia_jax
from inertia_jax.atomic import appearing
from train.config import Config
from train.config_file import config_to_json, differing_fields, fill_defaults
from train.errors import UsageError, user_input
from train.run.events import Events

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES")

# The files of a run's directory.
_FILES = {"config.json", "run.jsonl", "metrics.jsonl", "tensorboard", "checkpoints"}


def describe_machine() -> dict[str, Any]:
    """Returns hardware, versions and the command, as records hold them."""
    device = jax.devices()[0]
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    cpu = re.search(r"^model name\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return {
        "command": shlex.join(["python", "-m", "train", *sys.argv[1:]]),
        "backend": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "num_cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            "inertia_jax": inertia_jax.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        # The settings of XLA and malloc, by the user or by the program.
        "environment": {n: os.environ[n] for n in _VARIABLES if n in os.environ},
    }


class RunDirectory:
    """A run's configuration, starts, metrics, TensorBoard events and checkpoints.

    With several processes, only the first writes.
    """

    def __init__(self, path: pathlib.Path, config: Config, *, resume: bool) -> None:
        """Opens the directory of a run, new or to be resumed.

        Raises:
            UsageError: It holds another run, or this one and `resume` is false.
        """
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._events: Events | None = None
        self._lock: IO[str] | None = None
        self._is_writer = jax.process_index() == 0
        self._config = config
        config_file = path / "config.json"
        # A run that saved no checkpoint may be replaced: nothing is lost.
        self._is_new = not self.has_checkpoints
        if config_file.is_file() and not self._is_new:
            there = read_json(config_file)
            there = fill_defaults(there, config_to_json(Config()))
            differing = differing_fields(there, config_to_json(config))
            if differing:
                listed = "\n  ".join(differing)
                raise UsageError(
                    f"{path} holds a run with another config; nothing was changed. "
                    f"Choose another --workdir, or undo:\n  {listed}"
                )
            if not resume:
                raise UsageError(
                    f"{path} holds this run already; --resume goes on with it, another "
                    f"--workdir starts a new one. Nothing was changed."
                )
        elif path.exists() and not (is_empty_directory(path) or self._is_begun()):
            raise UsageError(f"{path} exists and holds no run; nothing was changed.")

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
            self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UsageError(f"another process is training in {self.path}.") from error
        if self._is_new and self.has_checkpoints:
            self._lock.close()
            raise UsageError(f"another run was in {self.path} meanwhile.")

    def open(self, step: int) -> None:
        """Begins to write, after `step`: later lines of metrics are dropped."""
        if not self._is_writer:
            return
        started = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step}
        with user_input():
            if self._is_new:
                for name in ("run.jsonl", "metrics.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            config = json.dumps(config_to_json(self._config), indent=1)
            write_whole(self.path / "config.json", config)
            with (self.path / "run.jsonl").open("a") as file:
                file.write(json.dumps({**started, **describe_machine()}) + "\n")
            if self._metrics.is_file():
                kept = [
                    line
                    for line in self._metrics.read_text().splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["step"] <= step
                ]
                write_whole(self._metrics, "".join(kept))
            self._events = Events(self.path / "tensorboard", step)

    def log(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds a line of metrics, of kind `train`, `epoch` or `test`."""
        if self._events is None:
            return
        with user_input(), self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        self._events.add(step, kind, metrics)

    def close(self) -> None:
        """Writes out what is buffered, and lets other runs have the directory."""
        try:
            if self._events is not None:
                self._events.close()
        finally:
            if self._lock is not None:
                self._lock.close()


def read_json(path: pathlib.Path) -> Any:
    """Reads a file of JSON.

    Raises:
        UsageError: The file cannot be read, or is no JSON.
    """
    with user_input():
        text = path.read_text()
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}.") from error


def is_empty_directory(path: pathlib.Path) -> bool:
    """Returns whether a directory holds nothing but hidden files."""
    # A run that was killed at its start may have left hidden files.
    return path.is_dir() and all(p.name.startswith(".") for p in path.iterdir())


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    # Only one process writes a run; it replaces what a killed process left.
    with appearing(path, writer="run") as partial:
        partial.write_text(text)
