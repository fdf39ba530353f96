"""Huge pages, and memory given back after compiling."""

import os
import subprocess
import sys

import jax
import pytest

from train import host_memory

MADVISE = "always [madvise] never"


@pytest.fixture
def restarts(monkeypatch, tmp_path):
    """What a process would be replaced by; the kernel's switch is a file to write."""
    found = []
    monkeypatch.setattr(os, "execv", lambda *args: found.append(args))
    monkeypatch.setattr(host_memory, "_glibc_version", lambda: (2, 36))
    monkeypatch.setattr(host_memory, "_SWITCH", tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / "enabled").write_text(MADVISE)
    return found


@pytest.mark.parametrize("before", [None, "glibc.malloc.tcache_count=0"])
def test_a_process_is_started_again_with_huge_pages(restarts, before, monkeypatch):
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    host_memory.restart_with_huge_pages()
    assert restarts == [(sys.executable, sys.orig_argv)]
    settings = os.environ["GLIBC_TUNABLES"].split(":")
    assert settings == [*([before] if before else []), "glibc.malloc.hugetlb=1"]
    host_memory.restart_with_huge_pages()
    assert len(restarts) == 1


def test_what_the_user_chose_stays(restarts, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    host_memory.restart_with_huge_pages()
    assert not restarts


@pytest.mark.parametrize("switch", ["[always] madvise never", "always madvise [never]"])
def test_a_kernel_that_asks_nobody_is_left_alone(restarts, switch):
    host_memory._SWITCH.write_text(switch)
    host_memory.restart_with_huge_pages()
    host_memory._SWITCH.unlink()
    host_memory.restart_with_huge_pages()
    assert not restarts


@pytest.mark.parametrize("version", [(0, 0), (2, 34)])
def test_other_c_libraries_are_left_alone(restarts, version, monkeypatch):
    monkeypatch.setattr(host_memory, "_glibc_version", lambda: version)
    host_memory.restart_with_huge_pages()
    assert not restarts


def test_the_restarted_command_is_the_same_one():
    """A program of its own: the arguments arrive, and the setting is there."""
    program = (
        "import os, sys; from train import host_memory;"
        "host_memory._glibc_version = lambda: (2, 36);"
        "host_memory._SWITCH = type('Switch', (), {'is_file': lambda: True,"
        f" 'read_text': lambda: {MADVISE!r}}});"
        "host_memory.restart_with_huge_pages();"
        "print(sys.argv[1:], os.environ['GLIBC_TUNABLES'])"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", program, "a b", "--c"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == "['a b', '--c'] glibc.malloc.hugetlb=1\n"


def test_memory_is_given_back_after_long_compilations(monkeypatch):
    class Library:
        trims = 0

        def malloc_trim(self, pad):
            assert pad == 0
            self.trims += 1

    library = Library()
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(host_memory, "_glibc_version", lambda: (2, 36))
    registered = []
    monkeypatch.setattr(
        jax.monitoring, "register_event_duration_secs_listener", registered.append
    )
    host_memory.give_back_after_compiling()
    (listen,) = registered
    listen("/jax/core/compile/backend_compile_duration", 0.1)
    listen("/jax/core/compile/jaxpr_trace_duration", 9.0)
    assert library.trims == 0
    listen("/jax/core/compile/backend_compile_duration", 0.3, fun_name="step")
    assert library.trims == 1


def test_jax_says_how_long_it_compiled():
    """The event that is listened for, which is no part of JAX's promised interface."""
    heard = []
    listen = lambda event, seconds, **_: heard.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 1.2345 - 6.789)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "/jax/core/compile/backend_compile_duration" in heard
