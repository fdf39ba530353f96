"""What the verb `compress` says while it works, and at its end."""

import shlex
import sys
import types

import pytest

from train.compress import progress
from train.compress.options import Compress
from train.verbs import compress


def test_elsewhere_than_on_a_terminal_lines_come_now_and_then(monkeypatch, capsys):
    now = iter([0.0, 4.0, 11.0, 11.5, 13.0, 22.0, 22.0, 23.0])
    clock = types.SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr(progress, "time", clock)
    with progress.shown_progress() as show:
        for done in range(5):
            show("fitting layers", done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "fitting layers: 1 of 4",
        "fitting layers: 3 of 4",
    ]


def test_on_a_terminal_a_bar_is_drawn_for_each_part(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.shown_progress() as show:
        for what in ("timing layers", "fitting layers"):
            for done in range(3):
                show(what, done, 2)
    said = capsys.readouterr().err
    assert said.index("timing layers") < said.index("fitting layers")
    assert "/2 [" in said


@pytest.mark.parametrize("data", ["npz:x.npz", None])
def test_factors_that_are_not_fine_tuned_come_with_the_command(data):
    args = Compress("a run", "small", ranks="evbmf", data=data)
    advice = compress._finetune_advice(args)
    assert "--finetune-epochs 5" in advice
    _, *words = shlex.split(advice.splitlines()[-1])
    expected = ["-m", "train", "finetune", "small", "--teacher", "a run"]
    assert words == expected + ([] if data else ["--data", "SOURCE"])


def test_the_images_of_the_gate_rates_are_said():
    args = Compress("run", "small", macs=0.8)
    test = {"num_examples": 1017, "data": "x.npz"}
    said = compress._where_counted(args, [test])
    assert said == (
        "gate rates as on the 1,017 test images of x.npz; --macs 0.8 holds on the "
        "training images that chose the thresholds, 512 at most"
    )
    said = compress._where_counted(args, [test, {"num_examples": 5, "data": "y.npz"}])
    assert "test images of x.npz, the first test set; --macs" in said
