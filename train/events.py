"""TensorBoard's events of a run, written beside its steps."""

import concurrent.futures
import pathlib
from typing import Any


class Events:
    """Scalars in a directory of TensorBoard's, begun when the first ones come.

    A thread of its own writes them: importing the writer imports PyTorch, too, where it
    is installed, for two seconds in which steps go on.
    """

    def __init__(self, path: pathlib.Path, step: int) -> None:
        """Writes nothing yet; events after `step` that lie there will be dropped."""
        self._path = path
        self._purge_step = step + 1 if step else None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def add(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds each metric as `kind/name`.

        Raises:
            OSError: The directory could not be written, now or before.
        """
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(1)
            self._writer = self._pool.submit(self._open)
        elif self._writer.done():
            self._writer.result()
        self._pool.submit(self._add, step, kind, metrics)

    def close(self) -> None:
        """Writes out what is buffered, and waits for it.

        Raises:
            OSError: The directory could not be written.
        """
        if self._pool is not None:
            self._pool.shutdown()
            self._writer.result().close()

    def _open(self) -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._path), purge_step=self._purge_step)

    def _add(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.result().add_scalar(f"{kind}/{name}", value, step)
