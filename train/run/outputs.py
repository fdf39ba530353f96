"""Files of results: their places are checked before the work starts."""

import errno
import json
import os
import pathlib
from typing import Any

from inertia_jax.atomic import appearing, local_path
from train.errors import UsageError, user_input
from train.result import as_json


def check_output(name: str, path: str | pathlib.Path | None) -> None:
    """Raises UsageError if a file or directory could not be written.

    Args:
        name: The option's name.
        path: The option's value; None if nothing will be written.
    """
    if path is None:
        return
    with user_input():
        place = local_path(path).expanduser().absolute()
        there = next(p for p in (place, *place.parents) if p.exists())
    is_place = there == place or there.is_dir()
    # A file is replaced, and the new one is first written beside it.
    written = [there, there.parent] if there.is_file() else [there]
    if not is_place or not all(os.access(p, os.W_OK) for p in written):
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
    """Writes a file of JSON, which appears whole or not at all; None: nothing.

    Numbers that JSON cannot hold are null.

    Raises:
        UsageError: The file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(as_json(value), indent=1, allow_nan=False) + "\n"
    with user_input():
        place = local_path(path).expanduser()
        if place.exists() and not place.is_file():  # such as /dev/stdout, or a pipe
            place.write_text(text)
            return
        if not place.parent.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, os.strerror(errno.ENOENT), str(place.parent)
            )
        with appearing(place) as partial:
            partial.write_text(text)
