"""Signals that ask a run to stop, which it does between two calls."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to act on between two calls."""

    def __init__(self) -> None:
        """Begins without a signal."""
        self.received: int | None = None
        self._calls = 0

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        # Several processes must stop at the same step. JAX's own service agrees on it
        # with a handler of its own, which a handler here would replace.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and in_main_thread:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def after_call(self) -> int | None:
        """Returns the signal to stop for after this call, or None."""
        if jax.process_count() > 1:
            # The service counts calls, and chooses the call after which all stop.
            self._calls += 1
            reached = multihost_utils.reached_preemption_sync_point(self._calls)
            return signal.SIGTERM if reached else None
        return self.received
