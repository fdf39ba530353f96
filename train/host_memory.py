"""Memory of the host: huge pages, and what compiling leaves behind. For glibc."""

import ctypes
import os
import pathlib
import sys

_TUNABLE = "glibc.malloc.hugetlb"
_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A program that takes this long to compile leaves enough behind to ask for it back.
_LONG_S = 0.2


def restart_with_huge_pages() -> None:
    """Replaces this process by itself, with `malloc` asking for huge pages.

    XLA on CPU takes a step's buffers from `malloc` anew each step and gives them back:
    with pages of 4 KiB, ResNet18 at batch 64 meets 135,000 page faults a step, a sixth
    of its time. glibc reads the setting, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, when
    a process starts and never again. Where the kernel gives huge pages to all or to
    nobody, or the setting is there, nothing is done.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or _glibc_version() < (2, 35):
        return
    if not _SWITCH.is_file() or "[madvise]" not in _SWITCH.read_text():
        return
    setting = f"{_TUNABLE}=1"
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{setting}" if tunables else setting
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


def give_back_after_compiling() -> None:
    """Has what the compiler freed given back to the system before a program first runs.

    glibc keeps it for later, hundreds of MB, on top of which a step's buffers come.
    """
    if _glibc_version() == (0, 0):
        return
    import jax

    trim = ctypes.CDLL(None).malloc_trim

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        is_compiled = event == "/jax/core/compile/backend_compile_duration"
        if is_compiled and duration_secs > _LONG_S:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def _glibc_version() -> tuple[int, int]:
    """Returns (0, 0) where the C library is another."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) if name == "glibc" else (0, 0)
    except (AttributeError, OSError, ValueError):
        return (0, 0)
