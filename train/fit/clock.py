"""Seconds of training alone: neither evaluation nor compilation counts."""

import math
import time
from collections.abc import Iterable
from typing import Any

import jax


class TrainingClock:
    """A stopwatch of a run's steps that leaves tracing and compiling out.

    It listens to JAX for these within `with`.
    """

    def __init__(self, seconds: float) -> None:
        """Begins with the seconds of the run's earlier starts, and stands still."""
        self._before = seconds
        self._start: float | None = None
        self._compiling: list[tuple[float, float]] = []

    def __enter__(self) -> "TrainingClock":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            self._compiling.append((end - duration_secs, end))

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        if self._start is None:
            return self._before
        passed = time.perf_counter() - self._start
        return self._before + passed - covered(self._compiling)

    def start(self) -> None:
        """Lets the clock run."""
        self._compiling.clear()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Stops it; the caller has waited for the devices."""
        self._before, self._start = self.seconds, None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union: functions are traced within each other."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
