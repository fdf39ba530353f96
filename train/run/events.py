"""TensorBoard's events of a run, written beside its steps."""

import concurrent.futures
import importlib.util
import pathlib
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from train.command import install_command
from train.errors import in_words
from train.run.lines import is_number


class Events:
    """What a directory for TensorBoard holds; it is made with the first event.

    A thread writes them, because importing the writer also imports PyTorch if it is
    installed; steps go on during these two seconds. If they cannot be written, a
    warning says so, and the run goes on without them.
    """

    def __init__(
        self, path: pathlib.Path, step: int, rows: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Begins to write what is missing there.

        Args:
            path: The directory.
            step: The step from which the run goes on; later events that lie there are
                dropped.
            rows: The lines of metrics until then. If events of one of them are missing,
                because a kill took them, all are written anew.

        Raises:
            ImportError: tensorboardX is not installed.
        """
        if importlib.util.find_spec("tensorboardX") is None:
            raise ImportError(
                "a run writes events for TensorBoard, which needs tensorboardX: "
                f"{install_command('train')}."
            )
        self._path = path
        self._step = step
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future[None] | None = None
        self._writer: Any = None
        self._has_failed = False
        if rows:
            self._last = self._pool.submit(self._write_missing, rows)

    def add(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Adds each metric as `kind/name`."""
        if self._last is not None and self._last.done():
            self._last.result()  # raises any error that is not a failure to write
        self._last = self._pool.submit(self._write, step, kind, metrics, time.time())

    def show(self, step: int, make: Callable[[Any], Sequence[Any]]) -> None:
        """Adds summaries that are no scalars.

        Args:
            step: The step that they belong to.
            make: A function of the module `tensorboardX.summary`, which returns them.
        """
        self._last = self._pool.submit(self._write_made, step, make, time.time())

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
        self._append(_scalars(step, kind, metrics, wall_time), self._step + 1)

    def _write_made(
        self, step: int, make: Callable[[Any], Sequence[Any]], wall_time: float
    ) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        events = [
            Event(wall_time=wall_time, step=step, summary=made)
            for made in make(summary)
        ]
        self._append(events, self._step + 1)

    def _write_missing(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes all events anew if some of these lines' are not there."""
        now = time.time()
        expected = {
            (event.step, event.summary.value[0].tag): event
            for row in rows
            for event in _scalars(
                row["step"], row["kind"], _metrics(row), row.get("time", now)
            )
        }
        try:
            files = sorted(self._path.glob("events.out.tfevents.*"))
            found = _read_scalars(files, self._step)
        except OSError as error:
            self._warn(error)
            return
        if expected.keys() <= found.keys():
            return
        # Those that are there keep their times.
        merged = sorted((expected | found).values(), key=lambda event: event.step)
        self._append(merged, 0)
        if not self._has_failed:
            for file in files:
                file.unlink(missing_ok=True)

    def _append(self, events: list[Any], start: int) -> None:
        """Writes events; a new file first drops those from the step `start` on."""
        if self._has_failed:
            return
        # `SummaryWriter` would not do: its own thread keeps its failures to itself.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._writer is None and self._step:
            log = SessionLog(status=SessionLog.START)
            dropping = Event(wall_time=time.time(), step=start, session_log=log)
            events = [dropping, *events]
        try:
            if self._writer is None:
                self._path.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._new_prefix()))
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._warn(error)

    def _new_prefix(self) -> pathlib.Path:
        """Returns the beginning of a file's name that no file there has."""
        # The rest of it is the second and the machine, so that a start soon after
        # another would replace its file.
        while any(self._path.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.1)
        return self._path / "events"

    def _warn(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            words = (
                f"no more events for TensorBoard: could not write: {in_words(error)}"
            )
            print(f"warning: {words}", file=sys.stderr)


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name not in ("step", "time") and is_number(value)
    }


def _scalars(
    step: int, kind: str, metrics: dict[str, float], wall_time: float
) -> list[Any]:
    """Returns an event for each metric."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    summaries = [scalar(f"{kind}/{name}", value) for name, value in metrics.items()]
    return [Event(wall_time=wall_time, step=step, summary=s) for s in summaries]


def _read_scalars(
    files: Sequence[pathlib.Path], last_step: int
) -> dict[tuple[int, str], Any]:
    """Returns the events of scalars until a step, by step and tag."""
    found: dict[tuple[int, str], Any] = {}
    for file in files:
        for event in _read_events(file.read_bytes()):
            if event.HasField("session_log"):  # what was gone back to
                found = {key: e for key, e in found.items() if key[0] < event.step}
            if event.summary.value and event.step <= last_step:
                found[event.step, event.summary.value[0].tag] = event
    return found


def _read_events(content: bytes) -> Iterator[Any]:
    """Yields the events of a file, as far as it is whole.

    A record is its length in 8 bytes, 4 bytes that check it, the event, and 4 bytes
    that check that.
    """
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            return
        try:
            event = Event.FromString(content[at + 12 : at + 12 + length])
        except Exception:  # of protobuf, which tensorboardX brings: damaged from here
            return
        yield event
        at += 16 + length
