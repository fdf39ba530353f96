"""The result of a verb, which `--json` prints in place of what people read."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

JSON = "--json"

_result: dict[str, Any] = {}


def add_result(values: Mapping[str, Any]) -> None:
    """Adds to what `--json` prints; a name that is there already has the new value."""
    _result.update(values)


@contextlib.contextmanager
def apart() -> Iterator[dict[str, Any]]:
    """Yields what a verb adds that another verb calls, and keeps it out of the object.

    The object that `--json` prints is then that of the calling verb alone.
    """
    global _result
    before, _result = _result, {}
    try:
        yield _result
    finally:
        _result = before


@contextlib.contextmanager
def printed_as_json(verb: str) -> Iterator[dict[str, Any]]:
    """Sends what is printed meanwhile to standard error, and then prints one object.

    It has `verb`, `exit_code`, `error` (None where there was none), and what the verb
    adds. Numbers that JSON cannot hold are null.

    Yields:
        The object, for the caller to set the exit code and the error.
    """
    _result.clear()
    _result.update(verb=verb, exit_code=0, error=None)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield _result
    except SystemExit as leaving:  # after options that are refused
        if leaving.code:
            _result.update(exit_code=leaving.code, error="the options are refused")
        raise
    finally:
        print(json.dumps(as_json(_result), allow_nan=False), flush=True)


def as_json(value: Any) -> Any:
    """Returns a value as JSON has it; numbers that it cannot hold are None."""
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if hasattr(value, "tolist"):  # an array, or a number of NumPy
        return as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)  # such as a path
