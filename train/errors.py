"""The one error that the user can do something about."""

import contextlib
from collections.abc import Iterator
from typing import Any


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
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def needs_torch(package: str = "PyTorch") -> Iterator[None]:
    """Says what to install if an import for `--against torch` fails."""
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"`--against torch` needs {package}: pip install 'inertia_jax[torch]'."
        ) from error
