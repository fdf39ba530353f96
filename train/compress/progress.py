"""The progress of a compression: a bar on a terminal, lines now and then elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from inertia_jax.progress import Progress
from train.machine.processes import say

# Seconds between two lines where there is no terminal.
_INTERVAL_S = 10.0


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yields a function that shows, on the first process, how many parts are done."""
    bar: tqdm | None = None
    shown_at = time.monotonic()
    is_over = threading.Event()

    def count_seconds() -> None:
        # A part may take minutes, and the bar's seconds pass meanwhile.
        while not is_over.wait(1.0):
            if (shown := bar) is not None:
                shown.refresh()

    def show(what: str, done: int, total: int) -> None:
        nonlocal bar, shown_at
        if jax.process_index() != 0:
            return
        if not sys.stderr.isatty():
            if time.monotonic() - shown_at >= _INTERVAL_S:
                say(f"{what}: {done:,} of {total:,}")
                shown_at = time.monotonic()
            return
        if bar is None or bar.desc != f"{what}: ":
            if bar is not None:
                bar.close()
            bar = tqdm(desc=what, total=total, leave=False, dynamic_ncols=True)
        bar.update(done - bar.n)
        if done == total:  # what is printed next must not meet the bar
            bar.close()
            bar = None

    if sys.stderr.isatty():
        threading.Thread(target=count_seconds, daemon=True).start()
    try:
        yield show
    finally:
        is_over.set()
        if bar is not None:
            bar.close()
