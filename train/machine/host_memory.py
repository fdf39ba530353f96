"""Memory of the host: huge pages, and what compiling leaves behind. For glibc."""

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import sys
from collections.abc import Iterator

from train.command import is_installed_command

NO_HUGE_PAGES = "--no-huge-pages"
_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
# This variable tells the process that replaces this one that it is the second, and what
# the user has in `GLIBC_TUNABLES`.
_RESTARTED = "INERTIA_JAX_RESTARTED"
# The verbs that take many steps. Others end before huge pages pay.
_LONG_VERBS = (
    *("fit", "finetune", "quickstart", "sweep", "study", "pipeline"),
    *("compress", "evaluate", "benchmark"),
)
_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# After so many seconds of compilation, memory is given back.
_LONG_S = 0.2

_restarted_with: str | None = None


def restart_with_huge_pages() -> None:
    """Replaces this process by itself, with `malloc` asking for huge pages.

    XLA on CPU takes a step's buffers from `malloc` anew each step and gives them back.
    With pages of 4 KiB, ResNet18 at batch 64 met 135,000 page faults a step. glibc
    reads the setting, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, when a process starts
    and never again.

    It does nothing if the user has the setting (0 turns it off) or says
    `--no-huge-pages`, if the kernel gives huge pages to all or to nobody, or if this
    process is anything but `inertia` or `python -m train` with a verb that computes
    for long. The second process says so when it begins to work. Programs that this
    one starts do not inherit the setting.
    """
    before = os.environ.pop(_RESTARTED, None)
    tunables = os.environ.get(_VARIABLE)
    if before is not None:
        global _restarted_with
        _restarted_with = os.environ.pop(_VARIABLE, None)
        if before:
            os.environ[_VARIABLE] = before
        return
    if _TUNABLE in (tunables or "") or _glibc_version() < (2, 35):
        return
    if not set(sys.argv[1:2]) & set(_LONG_VERBS):
        return
    if {NO_HUGE_PAGES, "-h", "--help"} & set(sys.argv):
        return
    command = ["-m", "train", *sys.argv[1:]]
    if is_installed_command():
        command = [*sys.argv]
    # A debugger's process, or a notebook's, is not ours to replace.
    if sys.orig_argv[-len(command) :] != command or sys.gettrace() is not None:
        return
    if not sys.executable or not _SWITCH.is_file():
        return
    if "[madvise]" not in _SWITCH.read_text():
        return
    setting = f"{_TUNABLE}=1"
    changes = {
        _VARIABLE: f"{tunables}:{setting}" if tunables else setting,
        _RESTARTED: tunables or "",
    }
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **changes})
    except OSError as error:
        print(f"note: no huge pages; starting again failed: {error}", file=sys.stderr)


@functools.cache
def _say_restarted() -> None:
    """Says, once, that this process was started again, if it was."""
    if _restarted_with is not None:
        print(
            f"this process was started again with huge pages "
            f"({_VARIABLE}={_restarted_with}); {NO_HUGE_PAGES} prevents it",
            file=sys.stderr,
        )


def malloc_tunables() -> str | None:
    """Returns the `GLIBC_TUNABLES` that this process was started with."""
    return _restarted_with or os.environ.get(_VARIABLE)


@contextlib.contextmanager
def tunables_for_children() -> Iterator[None]:
    """Gives programs that are started meanwhile the setting that this one has."""
    before = os.environ.get(_VARIABLE)
    if (setting := malloc_tunables()) is not None:
        os.environ[_VARIABLE] = setting
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


@functools.cache
def give_back_after_compiling() -> None:
    """Makes glibc return what the compiler freed before a program first runs.

    When the first one is compiled, it says whether this process was started again.

    glibc would keep it for later: hundreds of MB on top of a step's buffers.
    """
    if _glibc_version() == (0, 0):
        return
    import jax

    trim = ctypes.CDLL(None).malloc_trim
    trim.argtypes = [ctypes.c_size_t]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event != "/jax/core/compile/backend_compile_duration":
            return
        # Now the options, and what they name, have been found good.
        _say_restarted()
        if duration_secs > _LONG_S:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def _glibc_version() -> tuple[int, int]:
    """Returns the version of glibc; (0, 0) for another C library."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return (0, 0)
    major, minor = version.split(".")[:2]
    return (int(major), int(minor))
