"""Standard output and error that may go away: no training ends because of them."""

import io
import os
import select
import sys
from typing import Any, TextIO


class _LastingFile(io.FileIO):
    """A descriptor whose failures to write are noted, and raised to nobody."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        """Writes, or drops the content once a write has failed."""
        if self.error is None:
            try:
                while (written := super().write(content)) is None:
                    select.select([], [self], [])  # a slow reader, and no blocking
                return written
            except OSError as error:
                self.error = error
                if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                    print(
                        f"warning: standard output cannot be written: "
                        f"{error.strerror}; the rest of it is lost.",
                        file=sys.stderr,
                    )
        return memoryview(content).nbytes


_outputs: list[_LastingFile] = []


def keep_streams() -> None:
    """Lets the program go on when its standard output or error cannot be written.

    The reader of a pipe may end, a disk may be full, a terminal may be closed. Streams
    that were closed before the start lead nowhere, lest a file that is opened later
    take their place.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = _lasting(sys.stdout, 1)
    sys.stderr = _lasting(sys.stderr, 2)


def is_output_lost() -> bool:
    """Returns whether standard output failed, except by a reader who had enough."""
    sys.stdout.flush()
    return any(
        file.fileno() == 1 and not isinstance(file.error, BrokenPipeError | None)
        for file in _outputs
    )


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    """Returns a stream like one of Python's, which may be None, that raises nothing."""
    raw = _LastingFile(descriptor, "w", closefd=False)
    _outputs.append(raw)
    settings: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    if isinstance(stream, io.TextIOWrapper):
        names = ("encoding", "errors", "line_buffering", "write_through")
        settings = {name: getattr(stream, name) for name in names}
    unbuffered = settings.get("write_through", False)
    return io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), **settings)
