"""The quick start: a network dense, in factors and inertial, and their comparison."""

import json
import re

import jax
import pytest
from helpers import evaluate, read_metrics, save_bright_digits, stop_at

import inertia_jax as ij
from train.__main__ import main
from train.arguments import parse_options
from train.verbs import quickstart
from train.verbs.completion import KINDS
from train.verbs.quickstart import make_stages, next_commands

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
from train.config import Config, Data, Model, Optimizer
config = Config(
    epochs=4,
    batch_size=16,
    data=Data(source={source!r}, mean=(0.5,), std=(0.25,), crop_padding=1),
    model=Model(name="lenet", width=0.5),
    optimizer=Optimizer(learning_rate=0.05, schedule="cosine"),
)
"""


def start(workdir, capsys):
    """Runs the verb; returns its exit code, its object, and what people read."""
    capsys.readouterr()
    code = main(["quickstart", "--workdir", str(workdir), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def written(workdir):
    """Returns when each file was written."""
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A network and images that are smaller; returns the working directory."""
    source = save_bright_digits(tmp_path / "set.npz", 64, 32, 16)
    (tmp_path / "small.py").write_text(CONFIG.format(source=source))
    monkeypatch.setattr(quickstart, "_CONFIG", str(tmp_path / "small.py"))
    monkeypatch.setattr(quickstart, "_TUNING", ("--epochs", "2", "--batch-size", "16"))
    images = ("--calibration-images", "16", "--recalibration-images", "16")
    monkeypatch.setattr(quickstart, "_IMAGES", images)
    return tmp_path / "story"


@pytest.mark.slow
def test_the_whole_story_is_told_also_after_a_stop(small, capsys, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(20, patch)  # 16 steps are the dense network's, 8 of each fine-tuning
        code, found, said = start(small, capsys)
    assert (code, found["networks"], found["stopped_by"]) == (0, None, 15)
    assert "stopped in 'fine-tuning the network of" in said
    assert f"python -m train quickstart --workdir {small}" in said
    assert not (small / "inertial").exists()
    before = written(small)

    code, found, said = start(small, capsys)
    assert (code, found["stopped_by"], found["num_examples"]) == (0, None, 32)
    assert said.count("done before") == 2  # the dense network, and its factors
    kept = [p for p in before if p.is_relative_to(small / "dense")]
    kept += [p for p in before if p.is_relative_to(small / "tucker2")]
    assert len(kept) > 10 and all(p.stat().st_mtime_ns == before[p] for p in kept)
    assert "resuming from" in said
    epochs = [x for x in read_metrics(small / "tucker2_finetuned") if "top1" in x]
    assert [line["epoch"] for line in epochs] == [1, 2]

    rows = {row["network"]: row for row in found["networks"]}
    plans = {}
    assert [*rows] == ["dense", "tucker2", "inertial"]
    for name, row in rows.items():
        model, variables = ij.load_checkpoint(row["checkpoint"])
        plans[name] = model.plan.to_json()
        shape = ij.load_metadata(row["checkpoint"]).preprocessing.image_shape
        again = evaluate(row["checkpoint"], tmp_path)
        rates = {k[10:]: v for k, v in again.items() if k.startswith("gate_rate/")}
        cost = ij.count_cost(model, shape, gate_rates=rates)
        assert row["top1"] == again["top1"]
        assert row["macs"] == cost.total_macs
        assert row["params"] == cost.params
        sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
        assert row["params"] == sum(sizes)
        assert row["share_of_dense"] == row["macs"] / rows["dense"]["macs"]
        assert row["latency_ms"] > 0
        line = next(x for x in said.splitlines() if re.match(rf"{name} +\d+\.", x))
        assert f"{row['macs']:,}" in line and f"{row['top1']:.2%}" in line
    assert rows["tucker2"]["share_of_dense"] <= 0.5
    assert rows["inertial"]["share_of_dense"] < 1
    assert plans["dense"] == "[]"
    assert "rank_in" in plans["tucker2"] and "tiled" in plans["inertial"]
    page = (small / "report.html").read_text()
    assert found["page"] == str(small / "report.html")
    assert all(name in page for name in rows)

    before = written(small)
    assert start(small, capsys)[:2] == (0, found)
    assert written(small) == before


def test_a_report_of_other_checkpoints_is_written_again(tmp_path, monkeypatch):
    record = tmp_path / "report.json"
    run = tmp_path / "run"
    manifest = run / "manifest.json"
    run.mkdir()
    manifest.write_text("{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    record.write_text(
        json.dumps(
            {"subjects": [{"sha256": digest, "latency_ms": {"64": {}, "1": {}}}]}
        )
    )
    monkeypatch.setattr(quickstart, "find_checkpoint", lambda path: path)
    stage = quickstart.Stage("", ("report",), record)
    assert stage.is_complete([run])
    manifest.write_text("{ }")
    assert not stage.is_complete([run])


def test_every_command_that_it_prints_is_understood(tmp_path):
    commands = [stage.command for stage in make_stages(tmp_path)]
    assert [command[0] for command in commands] == [
        *("fit", "compress", "finetune", "compress", "finetune", "report")
    ]
    going_on = [command for _, command in next_commands(tmp_path)]
    assert len(going_on) == 3
    for verb, *words in [*commands, *going_on]:
        kind, default = KINDS[verb]
        parse_options(kind, words, verb=verb, default=default)
