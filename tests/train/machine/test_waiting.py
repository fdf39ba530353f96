"""Signs of life while something takes long."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from train.machine import waiting as module
from train.machine.waiting import refreshed, waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(module, "_LONG_S", 0.05)


def test_what_took_long_is_said_afterwards(quick, capsys):
    with waiting("evaluating"):
        pass
    assert capsys.readouterr().err == "evaluating\n"
    with waiting("evaluating"):
        time.sleep(0.06)
    assert capsys.readouterr().err == "evaluating\nevaluating: took 0 s\n"


def test_seconds_pass_on_a_terminal(quick, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with waiting("recalibrating"):
        time.sleep(0.2)
    assert terminal.getvalue().count("recalibrating: 00:00") > 3


def test_only_a_bar_that_is_seen_is_refreshed(quick, monkeypatch):
    bars = [tqdm(disable=disable, file=io.StringIO()) for disable in (True, False)]
    monkeypatch.setattr(sys, "stderr", Terminal())
    counts = []
    for bar in bars:
        calls = []
        bar.refresh = lambda calls=calls: calls.append(1)
        with refreshed(bar):
            time.sleep(0.2)
        counts.append(len(calls))
        time.sleep(0.05)
        assert len(calls) == counts[-1]  # and it ends with the block
    assert counts[0] == 0 and counts[1] > 3
