"""The one error that the user can do something about."""

import contextlib
from collections.abc import Iterator


class UsageError(Exception):
    """Bad input or environment: one line without a traceback, and exit code 2."""


class DivergedError(UsageError):
    """A loss or gradient that is not finite; running again would not help."""


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
