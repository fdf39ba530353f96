"""A clock for the seconds of training, without evaluation and compilation."""

import math
import time
from collections.abc import Iterable
from typing import Any

import jax


class TrainingClock:
    """A stopwatch for a run's steps that does not count tracing and compiling.

    Inside `with`, it listens to JAX's events about these.
    """

    def __init__(self, seconds: float) -> None:
        """Sets the clock, which does not run yet, to the seconds of earlier starts."""
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

    @property
    def compile_seconds(self) -> float:
        """Seconds of tracing and compiling since the clock was last started."""
        return covered(self._compiling)

    def start(self) -> None:
        """Starts the clock."""
        self._compiling.clear()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock; the caller has waited for the devices."""
        self._before, self._start = self.seconds, None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union; traces of nested functions overlap."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
