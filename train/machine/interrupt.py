"""What Ctrl-C does: `KeyboardInterrupt`, or the end where nobody would hear of it."""

import contextlib
import os
import sys
from types import FrameType
from typing import Any, NoReturn

_IMPORTS = "<frozen importlib"


def leave(number: int, frame: Any) -> NoReturn:
    """Ends the program while it starts: some imports swallow `KeyboardInterrupt`."""
    _end("interrupted before the work began.")


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raises `KeyboardInterrupt`; ends the program amid an import.

    Imports go on after one that comes in a callback of `importlib`, and some modules
    catch it.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTS):
            _end("interrupted before the end.")
        frame = frame.f_back
    raise KeyboardInterrupt


def _end(words: str) -> NoReturn:
    with contextlib.suppress(OSError, RuntimeError):  # it may be printing
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{words}\n".encode())
    os._exit(130)
