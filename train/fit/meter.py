"""The progress bar and the lines of metrics of a run."""

import sys
import time
from typing import Any

import jax
from tqdm import tqdm

from train.config import Config
from train.errors import DivergedError
from train.run.directory import RunDirectory


def progress_bar(steps: int | None, done: int, batch_size: int) -> tqdm:
    """Returns a run's bar, which counts images, of the first process on a terminal.

    Args:
        steps: The number of steps of the whole run; None: unknown.
        done: The number of steps taken before this start.
        batch_size: The number of images a step.
    """
    return tqdm(
        total=None if steps is None else steps * batch_size,
        initial=done * batch_size,
        unit="img",
        unit_scale=True,
        # Elsewhere than on a terminal, a run has a line an epoch.
        disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        mininterval=0.5,
        dynamic_ncols=True,
    )


class Meter:
    """Reads an epoch's totals one call late, logs them, and stops on a bad loss."""

    def __init__(
        self,
        directory: RunDirectory,
        bar: tqdm,
        config: Config,
        step: int,
        *,
        has_gates: bool,
    ) -> None:
        """Begins an epoch, or the rest of it after `step`."""
        self._directory, self._bar, self._config = directory, bar, config
        self._has_gates = has_gates
        self._pending: tuple[int, Any] | None = None
        self._first = self._logged = self._step = step
        self._start = self._since = time.perf_counter()
        self._last: dict[str, float] = {}

    def after_call(self, step: int, totals: Any) -> None:
        """Reports the call before this one, and keeps this one for later."""
        self.flush()
        self._pending = (step, totals)

    def flush(self) -> None:
        """Waits for the last call, and reports it."""
        if self._pending is None:
            return
        (step, totals), self._pending = self._pending, None
        totals = jax.device_get(totals)
        if totals.bad_step >= 0:
            kept = f"the last good checkpoint is left in {self._directory.checkpoints}"
            if not self._directory.has_checkpoints:
                kept = "no checkpoint had been saved yet"
            raise DivergedError(
                f"loss or gradient is not finite at step {int(totals.bad_step)}; "
                f"stopped; {kept}. A lower learning rate or a warm-up may help."
            )
        batch_size = self._config.batch_size
        self._last = {
            "loss": float(totals.loss / totals.count),
            "accuracy": float(totals.correct / totals.count),
        }
        if self._has_gates:
            self._last["gate_rate"] = float(totals.gate_rate / totals.count)
        self._bar.set_postfix(
            loss=f"{self._last['loss']:.4f}",
            acc=f"{self._last['accuracy']:.2%}",
            refresh=False,
        )
        self._bar.update((step - self._step) * batch_size)
        if step // self._config.log_steps > self._step // self._config.log_steps:
            now = time.perf_counter()
            rate = (step - self._logged) * batch_size / (now - self._since)
            self._directory.log(step, "train", {**self._last, "images_per_s": rate})
            self._since, self._logged = now, step
        self._step = step

    def log_epoch(self, epoch: int, train_seconds: float) -> str:
        """Logs the epoch that has ended, and returns it in words.

        Args:
            epoch: The epoch's number, from 0.
            train_seconds: The seconds of training since the start of the run.
        """
        images = (self._step - self._first) * self._config.batch_size
        rate = images / (time.perf_counter() - self._start)
        speed = {"images_per_s": rate, "train_seconds": train_seconds}
        metrics = {"epoch": epoch + 1, **self._last, **speed}
        self._directory.log(self._step, "epoch", metrics)
        loss, accuracy = self._last["loss"], self._last["accuracy"]
        words = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {rate:.0f} images/s"
        if self._has_gates:
            words += f"  gates {self._last['gate_rate']:.3f}"
        return words
