"""The one error that the user can do something about."""

import argparse
import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from inertia_jax.ops.inertial.settings import near_miss
from train.command import install_command

# What the system says of a disk, or of a share of it, that is full.
_FULL = {errno.ENOSPC, errno.EDQUOT}


class UsageError(Exception):
    """Bad input or environment: one line without a traceback, and exit code 2."""


class DivergedError(UsageError):
    """A loss or gradient that is not finite; running again would not help."""


def shortened(value: Any, *, most: int = 200) -> str:
    """Returns the `repr` of a value, cut where it is too long for an error."""
    text = repr(value)
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text):,} characters)"


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Turns the errors of code that checks the user's input into `UsageError`.

    Wrap only calls whose arguments come from the user: elsewhere a ValueError is a
    defect, and its traceback is wanted.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(in_words(error)) from error


def in_words(error: BaseException) -> str:
    """Returns an error's file and reason, and what to do where a disk is full."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        text = f"{named}{error.strerror}"
    if is_full(error):
        text = f"{text}; free some space, then run the same command again"
    return text


def is_full(error: BaseException) -> bool:
    """Returns whether an error says that a disk is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def leave_to_caller() -> None:
    """Keeps threads that write checkpoints from printing errors that their caller has.

    Orbax logs them with their tracebacks, and tensorstore prints one for each array
    that it then gives up.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)

    logging.getLogger("absl").addFilter(is_news)
    before = sys.unraisablehook

    def print_news(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = print_news


@contextlib.contextmanager
def needs_torch(package: str = "PyTorch") -> Iterator[None]:
    """Says what to install if an import for `--against torch` fails."""
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"`--against torch` needs {package}: {install_command('torch')}."
        ) from error


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """Returns a type for `argparse` whose error suggests the near miss."""

    def check(word: str) -> str:
        if word not in choices:
            listed = f"must be one of {', '.join(choices)}.{near_miss(word, choices)}"
            raise argparse.ArgumentTypeError(f"{word!r} {listed}")
        return word

    return check
