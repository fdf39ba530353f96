"""Seconds of training alone, and what reports say of them."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from train.__main__ import main
from train.fit import clock


def test_nested_intervals_count_once():
    assert clock.covered([]) == 0
    assert clock.covered([(4.0, 5.0), (1.0, 2.0), (0.0, 3.0), (2.5, 3.5)]) == 4.5


def test_the_clock_stands_still_between_epochs_and_leaves_compiling_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    compiled = "/jax/core/compile/backend_compile_duration"
    with clock.TrainingClock(7.0) as watch:
        jax.monitoring.record_event_duration_secs(compiled, 50.0)  # of an evaluation
        watch.start()
        now = 110.0
        jax.monitoring.record_event_duration_secs(compiled, 4.0)
        jax.monitoring.record_event_duration_secs("/jax/other", 4.0)
        assert watch.seconds == 7 + 6
        now = 111.0
        watch.stop()
        now = 200.0
        assert watch.seconds == 7 + 7
        watch.start()
        now = 201.0
        assert watch.seconds == 7 + 8
    jax.monitoring.record_event_duration_secs(compiled, 1.0)
    assert watch.seconds == 7 + 8


def test_what_jax_compiles_is_noticed():
    with clock.TrainingClock(0.0) as watch:
        watch.start()
        start = time.perf_counter()
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).block_until_ready()
        watch.stop()
        assert watch.seconds < time.perf_counter() - start


def write_run(path, seconds):
    """Makes the directory of a run whose accuracy rises by a tenth an epoch."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"name": "run"}))
    (path / "run.jsonl").write_text("")
    common = {"loss": 1.0, "accuracy": 0.5, "images_per_s": 10.0}
    lines = []
    for epoch, spent in enumerate(seconds, start=1):
        counted = {} if spent is None else {"train_seconds": spent}
        line = {"step": 4 * epoch, "epoch": epoch}
        lines.append({**line, "kind": "epoch", **common, **counted})
        scores = {"loss": 1.0, "top1": epoch / 10, "top5": 1.0}
        lines.append({**line, "kind": "test", **scores})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_reports_say_how_long_an_accuracy_took(tmp_path, capsys):
    run = write_run(tmp_path / "run", [1.5, 2.5, 3.5])
    assert main(["report", str(run), "--seconds-to", "0.2", "0.25", "0.9"]) == 0
    record = json.loads((run / "report.json").read_text())
    assert record["seconds_to"] == {
        "0.2": {"epoch": 2, "train_seconds": 2.5},
        "0.25": {"epoch": 3, "train_seconds": 3.5},
        "0.9": None,
    }
    printed = capsys.readouterr().out
    assert "20.00% after epoch 2, 2.5 s of training alone: without compiling" in printed
    assert "90.00% was not reached" in printed
    assert main(["report", str(run)]) == 0
    assert "seconds_to" not in json.loads((run / "report.json").read_text())


def test_seconds_that_were_not_all_counted_are_left_out(tmp_path, capsys):
    # An older version began the run, this one went on with it.
    run = write_run(tmp_path / "run", [None, 1.0, 2.0])
    assert main(["report", str(run), "--seconds-to", "0.3"]) == 0
    record = json.loads((run / "report.json").read_text())
    assert [row["train_seconds"] for row in record["curve"]] == [None] * 3
    assert "30.00% after epoch 3, unknown seconds" in capsys.readouterr().out


@pytest.mark.parametrize("accuracy", ["0", "94"])
def test_an_accuracy_is_a_share(accuracy, tmp_path, capsys):
    run = write_run(tmp_path / "run", [1.0])
    assert main(["report", str(run), "--seconds-to", accuracy]) == 2
    assert (
        f"`seconds_to` (={float(accuracy)}) must be in (0, 1]."
        in capsys.readouterr().err
    )
