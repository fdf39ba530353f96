"""Signals that stop a run."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT
from helpers import FIT_ONE, HEARING, save_bright_digits

from train.fit.stop import StopSignal
from train.run.checkpoints import latest_steps


@pytest.fixture(autouse=True)
def handlers():
    """Python's own handlers, which are there again after each test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_said(number, capfd):
    with StopSignal() as stop:
        assert stop.after_call() is None
        signal.raise_signal(number)
        assert stop.after_call() == number
    assert f"{number.name}: stops and saves" in capfd.readouterr().err
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGHUP])
def test_a_later_ctrl_c_ends_at_once(first):
    with StopSignal():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)  # as nohup does for SIGHUP
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert stop.after_call() is None
    assert signal.getsignal(number) is signal.SIG_IGN


def test_several_processes_are_asked_by_sigterm(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    found = []
    signal.signal(signal.SIGTERM, lambda number, _: found.append(number))  # JAX's
    with StopSignal():
        signal.raise_signal(signal.SIGHUP)
    assert found == [signal.SIGTERM]


@pytest.mark.slow
def test_a_closed_terminal_saves(subprocess_env, tmp_path):
    """The terminal is a pair of pseudo-terminals, whose other side is closed."""
    data = save_bright_digits(tmp_path / "set.npz", 64, 16, 10)
    run = tmp_path / "run"
    words = [*FIT_ONE, "--epochs", "99999", "--data.source", data]
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING, "-m", "train", *words, "--workdir", str(run)],
        env=subprocess_env,
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            os.read(ours, 10_000)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=100) == 0
    finally:
        process.kill()
    time.sleep(0.1)
    assert latest_steps(run / "checkpoints")
