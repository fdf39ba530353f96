"""TensorBoard's events of a run, written beside its steps."""

import concurrent.futures
import importlib.util
import pathlib
import sys
import time
from typing import Any


class Events:
    """Scalars in a directory for TensorBoard, which is made with the first of them.

    A thread writes them, because importing the writer also imports PyTorch if it is
    installed; steps go on during these two seconds. If they cannot be written, a
    warning says so, and the run goes on without them.
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
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future[None] | None = None
        self._writer: Any = None
        self._has_failed = False

    def add(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds each metric as `kind/name`."""
        if self._last is not None and self._last.done():
            self._last.result()  # raises any error that is not a failure to write
        self._last = self._pool.submit(self._write, step, kind, metrics, time.time())

    def close(self) -> None:
        """Waits until all is written."""
        self._pool.shutdown()
        if self._last is not None:
            self._last.result()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._warn(error)

    def _write(
        self, step: int, kind: str, metrics: dict[str, float], wall_time: float
    ) -> None:
        if self._has_failed:
            return
        # `SummaryWriter` would not do: its own thread keeps its failures to itself.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        summaries = [scalar(f"{kind}/{name}", value) for name, value in metrics.items()]
        events = [Event(wall_time=wall_time, step=step, summary=s) for s in summaries]
        if self._writer is None and self._step:
            start = SessionLog(status=SessionLog.START)
            after = self._step + 1
            events.insert(0, Event(wall_time=wall_time, step=after, session_log=start))
        try:
            if self._writer is None:
                self._path.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._path / "events"))
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            words = f"no more events for TensorBoard: could not write: {error}"
            print(f"warning: {words}", file=sys.stderr)
