"""Signals that ask a run to stop, which it does between two calls."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from train.machine.interrupt import interrupt

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGHUP, for the loop to act on between two calls.

    A second Ctrl-C ends the program at once. A signal that is ignored stays so, as
    SIGHUP does under `nohup`.
    """

    def __init__(self) -> None:
        """Begins without a signal."""
        self.received: int | None = None
        self._calls = 0

    def __enter__(self) -> "StopSignal":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        # Several processes must stop at the same step. JAX's own service agrees on it
        # with a handler of its own for SIGTERM, which a handler here would replace.
        several = jax.process_count() > 1
        for number in (signal.SIGHUP,) if several else _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                handler = self._pass_on if several else self._note
                self._previous[number] = signal.signal(number, handler)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received is not None:
            interrupt(number, frame)
        self.received = number
        words = (
            f"\n{signal.Signals(number).name}: stops and saves after the steps in "
            f"progress; Ctrl-C from now on ends without saving.\n"
        )
        # `print` may be what the signal interrupted, and must not be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, words.encode())

    def _pass_on(self, number: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

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
