"""Logs of JSON lines: read as far as they can be, and added to."""

import errno
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from inertia_jax.atomic import appearing

# The numbers that a line of metrics has, beside its step, by its kind.
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "epoch": ("epoch", "loss", "accuracy", "images_per_s"),
    "test": ("epoch", "loss", "top1", "top5"),
    "validation": ("epoch", "loss", "top1", "top5"),
}


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; says which ones it leaves out."""
    return _read(path, "step", _is_metrics)


def read_starts(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `run.jsonl`; says which ones it leaves out."""
    return _read(path, "started", lambda row: isinstance(row.get("started"), str))


def put_aside_unreadable(path: pathlib.Path) -> None:
    """Renames what lies at a log's place and is no file, or cannot be read."""
    try:
        if path.is_file():  # a pipe would be waited for
            path.read_bytes()
        elif path.exists() or path.is_symlink():
            raise OSError(errno.EINVAL, "no file")
    except OSError as error:
        aside = path.with_name(f"damaged_{path.name}")
        while aside.exists() or aside.is_symlink():
            aside = aside.with_name(f"damaged_{aside.name}")
        print(
            f"warning: cannot read {path}: {error.strerror}; it is put aside as "
            f"{aside.name}.",
            file=sys.stderr,
        )
        path.rename(aside)


def write_lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes a log that appears whole or not at all."""
    # Only one process writes a run; it replaces what a killed process left. A link that
    # came with the directory may point anywhere, so that it is replaced itself.
    with appearing(path, writer="run", through_links=False) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Log:
    """A file to which lines are added. One that cannot be written ends no training.

    What could not be written is kept, and is tried again with the next line.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Writes nothing yet; the file, if there is one, ends with a whole line."""
        self._path = path
        self._waiting = ""
        self._has_failed = False

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a line."""
        self._waiting += json.dumps(row) + "\n"
        self.flush()

    def flush(self) -> None:
        """Tries to write what waits; a first failure is said on standard error."""
        if not self._waiting:
            return
        try:
            append(self._path, self._waiting.encode())
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                print(
                    f"warning: could not write {self._path}: {error.strerror}; the "
                    f"run goes on, and writes these lines when it can.",
                    file=sys.stderr,
                )
            return
        self._waiting, self._has_failed = "", False

    def close(self) -> None:
        """Tries once more, and says how many lines could not be written."""
        self.flush()
        if lost := self._waiting.count("\n"):
            print(
                f"warning: {lost} lines of {self._path} could not be written.",
                file=sys.stderr,
            )


def append(path: pathlib.Path, content: bytes) -> None:
    """Adds all of `content` to a file, or, where that raises OSError, nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            _write_all(file, content)
        except OSError:
            file.truncate(end)  # no half line is left
            raise


def _write_all(file: Any, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def _is_metrics(row: dict[str, Any]) -> bool:
    names = ("step", *_NUMBERS.get(str(row.get("kind")), ()))
    whole = [row.get(name) for name in names if name in ("step", "epoch")]
    return (
        isinstance(row.get("kind"), str)
        and all(is_number(row.get(name)) for name in names)
        and all(isinstance(value, int) for value in whole)
    )


def is_number(value: Any) -> bool:
    """Returns whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(
    path: pathlib.Path, first: str, is_row: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Reads the objects of a log whose first field is `first`."""
    try:
        if not path.is_file():  # a pipe would be waited for
            if path.exists() or path.is_symlink():
                raise OSError(errno.EINVAL, "no file")
            return []
        content = path.read_bytes()
    except OSError as error:
        print(f"warning: left out {path}: {error.strerror}.", file=sys.stderr)
        return []
    rows, left_out = [], []
    lines = content.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    for number, line in enumerate(lines, start=1):
        row = parsed(line)
        if row is None:
            left_out.append(number)
            # A line may follow half of another, or zeros that a failing machine left.
            row = parsed(line[max(line.rfind(b'{"%s"' % first.encode()), 0) :])
        if row is not None and is_row(row):
            rows.append(row)
        elif number not in left_out[-1:]:
            left_out.append(number)
    if left_out:
        print(
            f"warning: {path}: of its {len(lines)} lines, these could not be read in "
            f"whole and are left out: {_in_words(left_out)}.",
            file=sys.stderr,
        )
    return rows


def parsed(text: str | bytes) -> dict[str, Any] | None:
    """Returns the object of a line of JSON, or None where it holds none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _in_words(numbers: list[int]) -> str:
    """Returns line numbers as text: `1, 4-6 and 2 more`."""
    runs = [
        [number for _, number in group]
        for _, group in itertools.groupby(
            enumerate(numbers), lambda pair: pair[1] - pair[0]
        )
    ]
    shown = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs[:5]]
    more = sum(map(len, runs[5:]))
    return ", ".join(shown) + (f" and {more} more" if more else "")
