"""Metrics of a run for Weights & Biases, where the user asks for it."""

import hashlib
import importlib
import pathlib
import sys
from typing import Any

from train.command import install_command
from train.errors import UsageError


def import_wandb() -> Any:
    """Returns the package.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UsageError(
            f"`--wandb` needs wandb: {install_command('wandb')}."
        ) from error


class WandbLog:
    """A run at Weights & Biases, which one that is resumed goes on with.

    What it raises while the run goes on is a warning, and the run goes on without it.
    """

    def __init__(
        self, path: pathlib.Path, *, name: str, config: dict[str, Any], started: str
    ) -> None:
        """Begins, or goes on with, a run in the project `inertia_jax`.

        Args:
            path: The run's directory, in which wandb keeps its files.
            name: The run's name.
            config: The run's configuration, as JSON has it.
            started: The time of the run's first start, which tells it from others.

        Raises:
            UsageError: wandb is not installed, or cannot begin.
        """
        wandb = import_wandb()
        # wandb tells runs apart by an identifier of at most 64 letters.
        place = f"{path.absolute()} {started}"
        identifier = hashlib.sha256(place.encode()).hexdigest()[:16]
        try:
            self._run: Any = wandb.init(
                project="inertia_jax",
                name=name,
                id=identifier,
                resume="allow",
                dir=str(path),
                config=config,
            )
        except Exception as error:  # wandb has many kinds, of its network and accounts
            raise UsageError(f"`--wandb`: {type(error).__name__}: {error}") from error

    def add(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds each metric as `kind/name`."""
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        self._guard(lambda run: run.log(named, step=step))

    def close(self) -> None:
        """Ends the run there."""
        self._guard(lambda run: run.finish())

    def _guard(self, call: Any) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # as above; no training ends because of it
            print(
                f"warning: no more metrics for Weights & Biases: "
                f"{type(error).__name__}: {error}",
                file=sys.stderr,
            )
            self._run = None
