"""A run's checkpoints: written in the background, the best and the latest two kept."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from inertia_jax import CheckpointDamagedError, save_checkpoint
from inertia_jax.atomic import remove
from inertia_jax.checkpoint import CheckpointWriteError, load_arrays, verify_checkpoint
from inertia_jax.metadata import (
    Metadata,
    best_step,
    checkpoint_path,
    latest_steps,
    load_metadata,
)
from inertia_jax.metadata import find_checkpoint as find_in_library
from train.command import shell_command
from train.errors import UsageError, in_words, user_input

_LATEST = 2


class Checkpoints:
    """The checkpoints `DIRECTORY/step_N` of a run.

    One background thread writes, hashes and deletes; training waits only while its
    state is copied to the host. Each process writes its share, and the first commits
    the whole.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """Opens the directory, which need not exist yet."""
        self._directory = directory
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future[None] | None = None
        if jax.process_index() == 0:
            for partial in directory.glob(".step_*.partial-*"):  # of a killed run
                remove(partial)

    def save(
        self,
        step: int,
        model: nn.Module,
        variables: Any,
        training: Any,
        metadata: Metadata,
    ) -> None:
        """Copies arrays to the host and begins to write them; all processes call.

        Raises:
            UsageError: The checkpoint before could not be written.
        """
        self.wait()
        # These are copies: on CPU, a view shares memory that the next step takes over.
        variables, training = jax.tree.map(np.array, (variables, training))
        metadata = dataclasses.replace(metadata, info={**metadata.info, "step": step})

        def write() -> None:
            path = checkpoint_path(self._directory, step)
            save_checkpoint(
                path,
                model,
                variables,
                training=training,
                metadata=metadata,
                together=True,
            )
            if jax.process_index() == 0:
                self._delete_old()

        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Waits until this process has written its share; the first also the whole.

        Raises:
            UsageError: The checkpoint could not be written; earlier ones are left.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (CheckpointWriteError, FileExistsError) as error:
            kept = latest_steps(self._directory)
            where = f"the latest on disk is step {kept[-1]}" if kept else "none on disk"
            raise UsageError(f"{in_words(error)} ({where}).") from error

    def abandon(self) -> None:
        """Gives up what is being written: a process that has to write it is gone."""
        self._pending = None

    def _delete_old(self) -> None:
        steps = latest_steps(self._directory)
        kept = {*steps[-_LATEST:], best_step(self._directory)}
        for step in steps:
            if step not in kept:
                path = checkpoint_path(self._directory, step)
                # It goes at once: a kill leaves no half of it under its name.
                going = path.with_name(f".{path.name}.partial-deleted")
                # A checkpoint that cannot be deleted is no reason to stop.
                with contextlib.suppress(OSError):
                    remove(going)
                    path.rename(going)
                    remove(going)

    def restore(self) -> tuple[pathlib.Path, dict[str, Any]] | None:
        """Returns the latest checkpoint that is whole, and its arrays.

        Damaged ones are reported on standard error and put aside. None means that there
        is no checkpoint yet.

        Raises:
            UsageError: There are checkpoints, and every one is damaged, or one cannot
                be read; nothing was changed.
        """
        damaged: list[pathlib.Path] = []
        for step in reversed(latest_steps(self._directory)):
            path = checkpoint_path(self._directory, step)
            try:
                verify_checkpoint(path)
            except (CheckpointDamagedError, FileNotFoundError) as error:
                print(f"warning: {error}", file=sys.stderr)
                damaged.append(path)
                continue
            except OSError as error:  # the disk's failure, not the checkpoint's
                raise UsageError(
                    f"cannot read {path}: {in_words(error)}; nothing was changed."
                ) from error
            _check_step(path, step)
            # If this came earlier, a run whose checkpoints are all damaged would look
            # like a new one.
            self._put_aside(damaged)
            return path, load_arrays(path)
        if damaged or any(self._directory.glob("damaged_step_*")):
            raise UsageError(
                f"every checkpoint in {self._directory} is damaged; nothing was "
                f"changed. Another --workdir starts anew."
            )
        return None

    def _put_aside(self, damaged: list[pathlib.Path]) -> None:
        for path in damaged:
            aside = path.with_name(f"damaged_{path.name}")
            print(
                f"warning: {path.name} is put aside as {aside.name}, and the one "
                f"before is used.",
                file=sys.stderr,
            )
            if jax.process_index() == 0:
                # Under its own name it would count as the latest or the best.
                with user_input():
                    remove(aside)
                    path.rename(aside)


def _check_step(path: pathlib.Path, step: int) -> None:
    """Raises UsageError unless a whole checkpoint is that of the step in its name."""
    with user_input():
        own = load_metadata(path).info.get("step", step)
    if own != step:
        raise UsageError(
            f"{path} holds the checkpoint of step {own}: it was renamed, or copied; "
            f"give it its own name again, or remove it. Nothing was changed."
        )


def last_checkpoint(run: pathlib.Path) -> pathlib.Path:
    """Returns the latest checkpoint of a run that has some."""
    checkpoints = run / "checkpoints"
    return checkpoint_path(checkpoints, latest_steps(checkpoints)[-1])


def find_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a checkpoint: `path` itself, or a run's best, or its latest.

    Raises:
        UsageError: There is neither a checkpoint nor a run at `path`.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        raise UsageError(
            f"{path} is a file, and no checkpoint; `{shell_command('import')}` makes "
            f"one of PyTorch weights."
        )
    with user_input():
        return find_in_library(path)


def manifest_sha256(checkpoint: pathlib.Path) -> str:
    """Returns the hash of a checkpoint's manifest, which has those of its files."""
    with user_input():
        manifest = (checkpoint / "manifest.json").read_bytes()
    return hashlib.sha256(manifest).hexdigest()
