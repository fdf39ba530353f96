"""TensorBoard's events of a run, written beside its steps."""

import concurrent.futures
import importlib.util
import pathlib
import time
from typing import Any


class Events:
    """Scalars in a directory of TensorBoard's, begun when the first ones come.

    A thread of its own writes them: importing the writer imports PyTorch, too, where it
    is installed, for two seconds in which steps go on.
    """

    def __init__(self, path: pathlib.Path, step: int) -> None:
        """Writes nothing yet; events after `step` that lie there will be dropped.

        Raises:
            ImportError: tensorboardX is not installed.
        """
        if importlib.util.find_spec("tensorboardX") is None:
            raise ImportError(
                "a run writes events for TensorBoard, which needs tensorboardX: "
                "pip install 'inertia_jax[train]'."
            )
        self._path = path
        self._step = step
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._writer: Any = None
        self._error: Exception | None = None

    def add(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds each metric as `kind/name`.

        Raises:
            OSError: What was added before could not be written.
        """
        if self._error is not None:
            raise self._error
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pool.submit(self._write, step, kind, metrics, time.time())

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            OSError: It could not be.
        """
        if self._pool is not None:
            self._pool.submit(self._close)
            self._pool.shutdown()
        if self._error is not None:
            raise self._error

    def _write(
        self, step: int, kind: str, metrics: dict[str, float], wall_time: float
    ) -> None:
        if self._error is not None:
            return
        # Not `SummaryWriter`, whose own thread keeps what it fails at to itself.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        try:
            if self._writer is None:
                self._path.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._path / "events"))
                if self._step:
                    start = SessionLog(status=SessionLog.START)
                    self._writer.write_event(
                        Event(
                            wall_time=wall_time, step=self._step + 1, session_log=start
                        )
                    )
            for name, value in metrics.items():
                summary = scalar(f"{kind}/{name}", value)
                event = Event(wall_time=wall_time, step=step, summary=summary)
                self._writer.write_event(event)
            self._writer.flush()
        except Exception as error:  # raised by what the run calls next
            self._error = error

    def _close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:  # raised by `close`
            self._error = self._error or error
