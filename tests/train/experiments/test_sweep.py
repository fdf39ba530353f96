"""Sweeps: one record a run, stopped and gone on with."""

import errno
import json
import os
import statistics

import pytest
from conftest import ROOT

import inertia_jax as ij
from train.__main__ import main
from train.errors import DivergedError, UsageError
from train.experiments.sweep import append_record, load_sweep, read_records
from train.networks import make_model

pytestmark = pytest.mark.usefixtures("one_device")
SWEEP = """
import dataclasses
from inertia_jax import Inertial, Plan
from train.config import Config, Data, Model, Optimizer
from train.experiments.sweep import Sweep

dense = Config(
    name="dense",
    epochs=1,
    batch_size=256,
    data=Data(source="digits", mean=(0.3,), std=(0.4,), crop_padding=0, flip=False),
    model=Model(name="lenet", width=0.1),
    optimizer=Optimizer(learning_rate=0.05),
)
plan = Plan((("conv2", Inertial(1, 3)),)).to_json()
model = dataclasses.replace(dense.model, plan=plan)
gated = dataclasses.replace(dense, name="gated", model=model)
sweep = Sweep((dense, gated), seeds=(1, 2))
"""


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    file, out = tmp_path / "some.py", tmp_path / "records.jsonl"
    file.write_text(SWEEP)

    def sweep(*options):
        arguments = ["--out", str(out), "--workdir", str(tmp_path / "runs"), *options]
        return main(["sweep", str(file), *arguments])

    def records():
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert sweep("--max-runs", "1") == 0
    assert [(r["name"], r["seed"]) for r in records()] == [("dense", 1)]
    assert sweep() == 0
    expected = [("dense", 1), ("gated", 1), ("dense", 2), ("gated", 2)]
    assert [(r["name"], r["seed"]) for r in records()] == expected
    before = out.read_bytes()
    capsys.readouterr()
    assert sweep() == 0
    assert out.read_bytes() == before
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    for row, name in zip(rows, ("dense", "gated"), strict=True):
        top1 = [100 * r["top1"] for r in records() if r["name"] == name]
        assert row[:2] == [name, "2"]
        assert row[2] == f"{statistics.mean(top1):.2f}%"
        assert row[3] == f"{statistics.stdev(top1):.2f}"
    dense, gated = records()[:2]
    assert dense["gate_rates"] == {} and gated["gate_rates"].keys() == {"conv2"}
    assert gated["cost"]["macs"] < gated["cost"]["dense_macs"] == dense["cost"]["macs"]
    file.write_text(SWEEP.replace("learning_rate=0.05", "learning_rate=0.06"))
    assert sweep() == 2
    assert "dense, seed 1, has another configuration" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_record_that_a_kill_cut_off_is_run_again(tmp_path):
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    whole = {"name": "a", "seed": 1, "config": {}}
    path.write_text(json.dumps(whole) + '\n{"name": ')
    assert read_records(path) == [whole]
    append_record(path, {**whole, "seed": 2}, workdir=tmp_path)
    assert [record["seed"] for record in read_records(path)] == [1, 2]
    # A whole one is kept, with or without the end of its line.
    path.write_text(json.dumps(whole))
    append_record(path, {**whole, "seed": 2}, workdir=tmp_path)
    assert [record["seed"] for record in read_records(path)] == [1, 2]


def test_a_run_has_one_record_whoever_trained_it(tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    out.touch()
    records = [{"name": "a", "seed": seed, "config": {}} for seed in (1, 2)]
    for record in (*records, {**records[0], "top1": 1.0}):
        append_record(out, record, workdir=tmp_path)
    assert read_records(out) == records
    assert "has a record of a, seed 1, by another sweep" in capsys.readouterr().err
    elsewhere = {"data": {"source": "npz:there/set.npz", "cache_dir": "there"}}
    moved = {"data": {"source": "npz:/here/set.npz"}}
    for config in (elsewhere, moved):
        record = {"name": "b", "seed": 1, "config": config}
        append_record(out, record, workdir=tmp_path)
    assert "has a record of b, seed 1" in capsys.readouterr().err
    before = out.read_bytes()
    for config in ({"epochs": 3}, {"data": {"source": "npz:set2.npz"}}, []):
        for name in ("a", "b"):
            record = {"name": name, "seed": 1, "config": config}
            with pytest.raises(UsageError, match="with another config") as found:
                append_record(out, record, workdir=tmp_path / "my_run")
            assert f"kept in {tmp_path / 'my_run'}:" in str(found.value)
    assert out.read_bytes() == before and not capsys.readouterr().err
    out.write_text(2 * (json.dumps(records[0]) + "\n"))
    with pytest.raises(UsageError, match="two records of a, seed 1, in lines 1 and 2"):
        read_records(out)


def test_a_record_that_cannot_be_written_leaves_no_half(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    whole = {"name": "a", "seed": 1, "config": {}}
    # Two that were written: one is whole, the other a kill cut off.
    path.write_text(json.dumps(whole) + '\n{"name": ')

    def write_half(file, content):
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.run.lines._write_all", write_half)
    with pytest.raises(OSError, match="No space left"):
        append_record(path, {**whole, "seed": 2}, workdir=tmp_path)
    assert path.read_text() == json.dumps(whole) + "\n"


def test_a_run_whose_record_another_sweep_has_is_kept(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "some.py", tmp_path / "records.jsonl"
    file.write_text(SWEEP)
    other = {"name": "dense", "seed": 1, "config": {"epochs": 7}}

    def fit_beside_another(config, *, workdir, resume):
        out.write_text(json.dumps(other) + "\n")
        raise DivergedError("loss or gradient is not finite")

    monkeypatch.setattr("train.verbs.sweep.fit", fit_beside_another)
    runs = tmp_path / "runs"
    arguments = ["--out", str(out), "--workdir", str(runs), "--max-runs", "1"]
    assert main(["sweep", str(file), *arguments]) == 2
    assert f"kept in {runs / 'some' / 'dense_seed1'}:" in capsys.readouterr().err
    assert read_records(out) == [other]


@pytest.mark.parametrize("text", ["my notes, no record", '{"name": "a"}\n', "[1]\n"])
def test_a_file_of_something_else_is_left_alone(text, tmp_path, capsys):
    file, out = tmp_path / "some.py", tmp_path / "notes.txt"
    file.write_text(SWEEP)
    out.write_text(text)
    assert main(["sweep", str(file), "--out", str(out)]) == 2
    assert "line 1, holds no record of a sweep" in capsys.readouterr().err
    assert out.read_text() == text


@pytest.mark.slow
def test_a_run_that_diverges_is_noted_and_the_others_go_on(tmp_path, capsys):
    file, out = tmp_path / "some.py", tmp_path / "records.jsonl"
    worse = "sweep = Sweep((dataclasses.replace(dense, name='bad', optimizer="
    worse += "dataclasses.replace(dense.optimizer, learning_rate=1e30)), dense), (1,))"
    file.write_text(SWEEP + worse)
    command = ["sweep", str(file), "--out", str(out)]
    command += ["--workdir", str(tmp_path / "runs")]
    assert main(command) == 1
    bad, dense = read_records(out)
    assert "not finite" in bad["failed"] and dense["top1"] > 0
    assert "bad, seed 1, failed: loss or gradient" in capsys.readouterr().out
    assert main(command) == 1  # nothing is left to run, and one had failed
    assert main([*command, "--only", "dense"]) == 0


@pytest.mark.slow
def test_a_sweeps_networks_are_timed_beside_each_other(tmp_path, capsys):
    file, out = tmp_path / "some.py", tmp_path / "record.json"
    file.write_text(SWEEP)
    command = ["benchmark", "--suite", "sweep", "--sweep", str(file), "--steps", "2"]
    command += ["--repeats", "2", "--out", str(out)]
    assert main([*command, "--batch-size", "9"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "gated"]
    assert [list(row["gate_rates"]) for row in rows] == [[], ["conv2"]]
    dense, gated = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert dense[0::2] == ["dense", "1.00", "1.00"]
    for column, what in ((2, "train"), (4, "evaluate")):
        assert all(row[what]["min_ms"] > 0 for row in rows)
        times = [row[what]["median_ms"] for row in rows]
        assert gated[column] == f"{times[1] / times[0]:.2f}"
    assert main([*command, "--batch-size", "361"]) == 2
    assert "`batch_size` (=361) must be at most 360" in capsys.readouterr().err
    assert main([*command, "--batch-size", "9", "--steps", "6"]) == 2
    assert "`steps` (=6) must be at most 5, an epoch" in capsys.readouterr().err


@pytest.mark.slow
def test_the_closed_network_of_the_sweep_is_counted_closed():
    configs = load_sweep(ROOT / "configs/sweeps/cifar10_inertial.py").configs

    def table(name):
        (config,) = [config for config in configs if config.name == name]
        return ij.count_cost(make_model(config.model, num_classes=10), (32, 32, 3))

    closed, opened = table("tiled_closed"), table("window_d3m1_weighted_open")
    assert {row.gate_rate for row in closed.rows} == {None, 0.0}
    assert {row.gate_rate for row in opened.rows} == {None, 1.0}
    assert "  0.000  " in str(closed) and "  1.000  " not in str(closed)
