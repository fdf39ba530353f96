"""Huge pages, and memory given back after compiling."""

import os
import subprocess
import sys
import types

import jax
import pytest

from train.machine import host_memory

MADVISE = "always [madvise] never"


@pytest.fixture
def restarts(monkeypatch, tmp_path):
    """What a process would be replaced by; the kernel's switch is a file to write."""
    found = []

    def replace(program, command, environment):
        found.append((program, command))
        for name in ("GLIBC_TUNABLES", host_memory._RESTARTED):
            monkeypatch.setenv(name, environment[name])

    monkeypatch.setattr(os, "execve", replace)
    monkeypatch.setattr(host_memory, "_glibc_version", lambda: (2, 36))
    monkeypatch.setattr(host_memory, "_SWITCH", tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv(host_memory._RESTARTED, raising=False)
    (tmp_path / "enabled").write_text(MADVISE)
    monkeypatch.setattr(host_memory, "_restarted_with", None)
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # also while lines are counted
    give_command(monkeypatch, "fit", "--epochs", "1")
    return found


def give_command(monkeypatch, *words):
    """Makes this the process of `python -m train WORDS`."""
    monkeypatch.setattr(sys, "argv", ["train/__main__.py", *words])
    command = [sys.executable, "-X", "dev", "-m", "train", *words]
    monkeypatch.setattr(sys, "orig_argv", command)


def test_the_installed_command_is_started_again_too(restarts, monkeypatch):
    command = ["/env/bin/inertia", "fit", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *command])
    host_memory.restart_with_huge_pages()
    assert restarts == [(sys.executable, [sys.executable, *command])]


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--epochs", "1", "--no-huge-pages"],
        ["--no-huge-pages", "fit"],
        ["fit", "--help"],
        ["report", "runs/fit"],
        ["export", "runs/fit", "--out", "evaluate"],
        [],
    ],
)
def test_what_is_short_or_refuses_is_not_started_again(restarts, words, monkeypatch):
    give_command(monkeypatch, *words)
    host_memory.restart_with_huge_pages()
    assert not restarts


@pytest.mark.parametrize("before", [None, "glibc.malloc.tcache_count=0"])
def test_a_process_is_started_again_with_huge_pages(
    restarts, before, monkeypatch, capsys
):
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    host_memory.restart_with_huge_pages()
    assert restarts == [(sys.executable, sys.orig_argv)]
    setting = os.environ["GLIBC_TUNABLES"]
    wanted = [*([before] if before else []), "glibc.malloc.hugetlb=1"]
    assert setting.split(":") == wanted
    assert capsys.readouterr().err == ""
    # The second process has the setting, and its children do not inherit it.
    host_memory.restart_with_huge_pages()
    assert len(restarts) == 1
    assert os.environ.get("GLIBC_TUNABLES") == before
    assert host_memory._RESTARTED not in os.environ
    assert host_memory.malloc_tunables() == setting
    with host_memory.tunables_for_children():
        assert os.environ["GLIBC_TUNABLES"] == setting
    assert os.environ.get("GLIBC_TUNABLES") == before


def test_a_process_is_started_again_once_whatever_becomes_of_the_setting(
    restarts, monkeypatch
):
    host_memory.restart_with_huge_pages()
    monkeypatch.delenv("GLIBC_TUNABLES")
    host_memory.restart_with_huge_pages()
    assert len(restarts) == 1
    assert host_memory._RESTARTED not in os.environ


@pytest.mark.parametrize(
    "command",
    [
        ["python", "-"],
        ["python", "-c", "import runpy", "fit", "--epochs", "1"],
        ["python", "-m", "pytest", "fit", "--epochs", "1"],
        ["ipykernel_launcher.py", "-f", "kernel.json"],
    ],
)
def test_other_commands_are_left_alone(restarts, command, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", command)
    host_memory.restart_with_huge_pages()
    assert not restarts


def test_debuggers_and_unknown_interpreters_are_left_alone(restarts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "gettrace", lambda: print)
        host_memory.restart_with_huge_pages()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")
        host_memory.restart_with_huge_pages()
    assert not restarts


@pytest.mark.parametrize("before", [None, "glibc.malloc.tcache_count=0"])
def test_a_program_that_cannot_be_started_again_goes_on(
    restarts, before, monkeypatch, capsys
):
    def fail(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "execve", fail)
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    host_memory.restart_with_huge_pages()
    assert os.environ.get("GLIBC_TUNABLES") == before
    assert host_memory._RESTARTED not in os.environ
    assert "no huge pages; starting again failed: no" in capsys.readouterr().err


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


@pytest.mark.slow
def test_the_program_starts_itself_again_and_says_what_it_would(tmp_path):
    """Each start of an interpreter leaves its setting and process in a file."""
    asks = host_memory._SWITCH.is_file() and "[madvise]" in (
        host_memory._SWITCH.read_text()
    )
    if not asks or host_memory._glibc_version() < (2, 35):
        pytest.skip("this kernel gives huge pages to all or to nobody, or no glibc")
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a') as file:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), file=file)\n"
    )
    hidden = ("GLIBC_TUNABLES", host_memory._RESTARTED)
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env.pop("COVERAGE_PROCESS_CONFIG", None)  # a traced process is not replaced
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    for tunables, settings in (
        (None, ["None", "glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.hugetlb=0", ["glibc.malloc.hugetlb=0"]),
    ):
        (tmp_path / "starts").unlink(missing_ok=True)
        out = subprocess.run(
            [sys.executable, "-m", "train", "evaluate", "no such place"],
            env={**env, **({"GLIBC_TUNABLES": tunables} if tunables else {})},
            capture_output=True,
            text=True,
        )
        starts = [s.split() for s in (tmp_path / "starts").read_text().splitlines()]
        assert [setting for _, setting in starts] == settings
        assert len({process for process, _ in starts}) == 1
        assert out.returncode == 2
        (line,) = out.stderr.splitlines()
        assert "no such place" in line


def test_memory_is_given_back_after_long_compilations(monkeypatch, capsys):
    trims = []

    def malloc_trim(pad):
        trims.append(pad)

    library = types.SimpleNamespace(malloc_trim=malloc_trim)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(host_memory, "_glibc_version", lambda: (2, 36))
    registered = []
    monkeypatch.setattr(
        jax.monitoring, "register_event_duration_secs_listener", registered.append
    )
    host_memory.give_back_after_compiling.cache_clear()
    host_memory.give_back_after_compiling()
    host_memory.give_back_after_compiling()
    host_memory.give_back_after_compiling.cache_clear()
    (listen,) = registered
    listen("/jax/core/compile/backend_compile_duration", 0.1)
    listen("/jax/core/compile/jaxpr_trace_duration", 9.0)
    assert not trims
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(host_memory, "_restarted_with", "glibc.malloc.hugetlb=1")
    host_memory._say_restarted.cache_clear()
    for _ in range(2):
        listen("/jax/core/compile/backend_compile_duration", 0.3, fun_name="step")
    host_memory._say_restarted.cache_clear()
    assert trims == [0, 0]
    # When the work has begun, and options have been found good.
    assert capsys.readouterr().err == (
        "this process was started again with huge pages "
        "(GLIBC_TUNABLES=glibc.malloc.hugetlb=1); --no-huge-pages prevents it\n"
    )


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
