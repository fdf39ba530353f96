"""Signs of life on a terminal while something takes long."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from train.machine.processes import say

# Seconds between two signs.
_INTERVAL_S = 1.0
# What takes less is not spoken of afterwards.
_LONG_S = 3.0


@contextlib.contextmanager
def refreshed(bar: tqdm) -> Iterator[None]:
    """Lets the seconds of a bar pass on a terminal while nothing moves it."""
    if bar.disable or not sys.stderr.isatty():
        yield
        return
    is_over = threading.Event()

    def refresh() -> None:
        while not is_over.wait(_INTERVAL_S):
            bar.refresh()

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what begins, and how long it took if that was long.

    On a terminal, its seconds are counted meanwhile.
    """
    if not sys.stderr.isatty() or jax.process_index() != 0:
        say(what)
        start = time.perf_counter()
        yield
        if (seconds := time.perf_counter() - start) >= _LONG_S:
            say(f"{what}: took {seconds:.0f} s")
        return
    with tqdm(bar_format=f"{what}: {{elapsed}}") as bar, refreshed(bar):
        yield
