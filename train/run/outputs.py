"""Files of results: their places are checked before the work starts."""

import json
import os
import pathlib
from typing import Any

from train.errors import UsageError, user_input


def check_output(name: str, path: str | pathlib.Path | None) -> None:
    """Raises UsageError if a file or directory could not be written.

    Args:
        name: The option's name.
        path: The option's value; None if nothing will be written.
    """
    if path is None:
        return
    place = pathlib.Path(path).expanduser().absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    is_place = there == place or there.is_dir()
    if not is_place or not os.access(there, os.W_OK):
        raise UsageError(f"`{name}` (={path}) cannot be written.")


def check_output_file(name: str, path: str | pathlib.Path | None) -> None:
    """Raises UsageError if a file could not be written, or has no directory."""
    check_output(name, path)
    if path is None:
        return
    place = pathlib.Path(path).expanduser().absolute()
    if place.is_dir():
        raise UsageError(f"`{name}` (={path}) must be a file; it is a directory.")
    if not place.exists() and not place.parent.is_dir():
        raise UsageError(f"`{name}` (={path}) is in a directory that does not exist.")


def write_json(path: str | pathlib.Path | None, value: Any) -> None:
    """Writes a file of JSON; None: nothing is written.

    Raises:
        UsageError: The file cannot be written.
    """
    if path is not None:
        with user_input():
            text = json.dumps(value, indent=1) + "\n"
            pathlib.Path(path).expanduser().write_text(text)
