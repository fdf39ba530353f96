"""Studies: a dense network and smaller ones, each stage a command, all compared."""

import dataclasses
import hashlib
import json
import re

import jax
import numpy as np
import pytest
from helpers import evaluate, read_metrics, save_bright_digits, stop_at

import inertia_jax as ij
from train.__main__ import main
from train.arguments import parse_options
from train.config_file import load_from_file, shipped_configs, shipped_names
from train.errors import UsageError
from train.experiments import study as studies
from train.experiments.study import Stage, format_networks, make_stages, run_study
from train.experiments.study_config import Smaller, Study
from train.verbs.completion import KINDS

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
from train.config import Config, Data, Model, Optimizer
config = Config(
    epochs=4,
    batch_size=16,
    data=Data(source="nowhere", mean=(0.5,), std=(0.25,), crop_padding=1),
    model=Model(name="lenet", width=0.5),
    optimizer=Optimizer(learning_rate=0.05, schedule="cosine"),
)
"""
STUDY = """
from train.experiments.study_config import Smaller, Study
study = Study(
    config={config!r},
    smaller={{
        "tucker2": Smaller(("--ranks", "budget:macs=0.5")),
        "both": Smaller(("--macs", "0.97"), start="tucker2"),
    }},
    compress=("--calibration-images", "16", "--recalibration-images", "16"),
    finetune=("--epochs", "2", "--batch-size", "16"),
    teacher=True,
    control=True,
    export=("--batch-size", "64"),
    against=("onnx",),
)
"""
NAMES = ["dense", "tucker2", "both", "control"]


def written(workdir):
    """Returns when each file was written."""
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_whole_story_is_told_also_after_a_stop(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = save_bright_digits(tmp_path / "set.npz", 64, 64, 16)
    (tmp_path / "small.py").write_text(CONFIG)
    file, workdir = tmp_path / "story.py", tmp_path / "runs"
    file.write_text(STUDY.format(config=str(tmp_path / "small.py")))
    words = ["study", str(file), "--data", source, "--workdir", str(workdir)]
    words += ["--record", str(tmp_path / "record.json"), "--json"]

    def start():
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    with pytest.MonkeyPatch.context() as patch:
        stop_at(20, patch)  # 16 steps are the dense network's, 8 of each fine-tuning
        code, found, said = start()
    assert (code, found["networks"], found["stopped_by"]) == (0, None, 15)
    assert "stopped in 'fine-tuning the network of" in said
    assert f"python -m train study {file}" in said
    assert not (workdir / "both").exists() and not (tmp_path / "record.json").exists()
    before = written(workdir)

    code, found, said = start()
    assert (code, found["stopped_by"], found["num_examples"]) == (0, None, 64)
    assert said.count("done before") == 2  # the dense network, and its factors
    kept = [p for p in before if p.is_relative_to(workdir / "dense")]
    kept += [p for p in before if p.is_relative_to(workdir / "tucker2")]
    assert len(kept) > 10 and all(p.stat().st_mtime_ns == before[p] for p in kept)
    assert "resuming from" in said
    epochs = [x for x in read_metrics(workdir / "tucker2_finetuned") if "top1" in x]
    assert [line["epoch"] for line in epochs] == [1, 2]
    teacher = json.loads((workdir / "control" / "config.json").read_text())["teacher"]
    assert "dense" in teacher

    rows = {row["network"]: row for row in found["networks"]}
    assert json.loads((tmp_path / "record.json").read_text())["networks"] == [
        *rows.values()
    ]
    assert [*rows] == NAMES
    plans, right = {}, {}
    for name, row in rows.items():
        model, variables = ij.load_checkpoint(row["checkpoint"])
        plans[name] = model.plan.to_json()
        metadata = ij.load_metadata(row["checkpoint"])
        again = evaluate(row["checkpoint"], tmp_path)
        right[name] = np.trace(again["confusion"])
        rates = {k[10:]: v for k, v in again.items() if k.startswith("gate_rate/")}
        shape = metadata.preprocessing.image_shape
        cost = ij.count_cost(model, shape, gate_rates=rates)
        assert row["top1"] == again["top1"]
        assert row["difference"] == pytest.approx((right[name] - right["dense"]) / 64)
        assert (row["margin_95"] > 0) or row["difference"] in (0, 1, -1)
        assert row["macs"] == cost.total_macs
        small = workdir / name
        if name in ("tucker2", "both"):
            stage = "raw" if name == "tucker2" else "inertial"  # without BatchNorm
            assert [*row["untuned"]] == [stage]
            assert [*row["untuned"].values()][-1] == evaluate(small, tmp_path)["top1"]
        else:
            assert row["untuned"] is None
        assert row["params"] == cost.params
        sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
        assert row["params"] == sum(sizes)
        assert row["share_of_dense"] == row["macs"] / cost.dense_macs
        assert row["file_bytes"] == (workdir / f"{name}.ijx").stat().st_size
        times = [row["times_ms"][p][n] for p in ("jax", "onnx") for n in ("1", "64")]
        assert min(times) > 0
        line = next(x for x in said.splitlines() if re.match(rf"{name} +\d+\.", x))
        assert f"{row['macs']:,}" in line and f"{row['top1']:.2%}" in line
    assert rows["tucker2"]["share_of_dense"] <= 0.5
    assert rows["both"]["share_of_dense"] < rows["tucker2"]["share_of_dense"]
    assert plans["dense"] == plans["control"] == "[]"
    assert "rank_in" in plans["tucker2"] and "tiled" not in plans["tucker2"]
    assert "rank_in" in plans["both"] and "tiled" in plans["both"]
    page = (workdir / "report.html").read_text()
    assert found["page"] == str(workdir / "report.html")
    assert all(name in page for name in rows)

    before = written(workdir)
    assert start()[:2] == (0, found)
    assert written(workdir) == before
    file.write_text(file.read_text().replace("budget:macs=0.5", "budget:macs=0.4"))
    code, found, said = start()
    assert code == 2 and "was made by another command" in found["error"]
    assert "macs=0.5" in found["error"] and "macs=0.4" in found["error"]
    assert written(workdir) == before


def test_files_of_other_checkpoints_are_written_again(tmp_path, monkeypatch):
    run, record, file = tmp_path / "run", tmp_path / "r.json", tmp_path / "x.ijx"
    run.mkdir()
    manifest = run / "manifest.json"
    manifest.write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    monkeypatch.setattr(studies, "find_checkpoint", lambda path: path)
    report = {"subjects": [{"sha256": digest, "latency_ms": {"1": {}, "64": {}}}]}
    rows = {"rows": [{"sha256": digest}, {"sha256": digest}]}
    file.write_text("")
    for verb, known in (("report", report), ("benchmark", rows), ("export", None)):
        out = file if verb == "export" else record
        stage = Stage("", (verb,), out, (run,))
        manifest.write_text("{}")
        record.write_text(json.dumps(known))
        file.touch()
        assert stage.is_complete()
        manifest.write_text("{ }")
        assert not stage.is_complete()
        out.unlink()
        assert not stage.is_complete()


DAMAGED = ["", "{", "[1]", '{"subjects": [1]}', '{"subjects": [{"sha": 1}]}']


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("verb", ["report", "benchmark"])
def test_a_damaged_record_is_not_complete(verb, content, tmp_path):
    file = tmp_path / "record.json"
    file.write_text(content)
    assert not Stage("", (verb,), file).is_complete()


@pytest.mark.parametrize("content", ["", "[1]", '{"dense": 1}', '{"dense": [1]}'])
def test_damaged_commands_are_named(content, tmp_path):
    file = tmp_path / "commands.json"
    file.write_text(content)
    with pytest.raises(UsageError, match="commands.json (holds no|is no JSON)"):
        run_study(Study(smaller={}, config="quickstart"), tmp_path)
    assert file.read_text() == content


@pytest.mark.parametrize("content", ['{"subject": []}', '{"subjects": [{}]}'])
def test_a_damaged_report_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text(content)
    monkeypatch.setattr(Stage, "is_complete", lambda stage: True)
    with pytest.raises(UsageError, match=r"once these are removed: .*report\.json\.$"):
        run_study(Study(smaller={}, config="quickstart"), tmp_path)


def test_a_report_without_times_is_not_complete(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    record = tmp_path / "r.json"
    record.write_text(json.dumps({"subjects": [{"sha256": digest, "latency_ms": {}}]}))
    monkeypatch.setattr(studies, "find_checkpoint", lambda path: path)
    assert not Stage("", ("report",), record, (tmp_path,)).is_complete()


@pytest.mark.parametrize("name", shipped_names("study"))
def test_shipped_studies_are_of_commands_that_are_understood(name, tmp_path):
    study = load_from_file(shipped_configs() / "studies" / f"{name}.py", "study", Study)
    if study.checkpoint is not None:
        imported = save_small(tmp_path / "imported")
        study = dataclasses.replace(study, checkpoint=imported)
    stages = make_stages(study, tmp_path, data="npz:x.npz")
    # Where a checkpoint is given, it need not say what its network was trained on.
    told = "--data.source" if study.checkpoint is None else "--data"
    words = stages[0].command
    assert words[words.index(told) + 1] == "npz:x.npz"
    for stage in stages:
        verb, *words = stage.command
        kind, default = KINDS[verb]
        parse_options(kind, words, verb=verb, default=default)
    tuned = [stage.out.name for stage in stages if stage.verb == "finetune"]
    assert tuned == [*(f"{n}_finetuned" for n in study.smaller), "control"]
    by_out = {stage.out.name: stage for stage in stages}
    for small, how in study.smaller.items():
        start = tmp_path / f"{how.start}_finetuned"
        if how.start == "dense":
            start = study.checkpoint or tmp_path / "dense"
        assert by_out[small].command[1] == str(start)


HALF = Smaller(("--ranks", "budget:macs=0.5"))


@pytest.mark.parametrize(
    ("smaller", "named"),
    [
        ({"dense": HALF}, "'dense'"),
        ({"control": HALF}, "'control'"),
        ({"a/b": HALF}, "'a/b'"),
        ({"a": Smaller((), start="b"), "b": HALF}, "`start` (=b) of a"),
    ],
)
def test_bad_studies_are_refused(smaller, named):
    with pytest.raises(UsageError) as raised:
        Study(smaller=smaller, config="quickstart")
    assert named in str(raised.value)


@pytest.mark.parametrize(
    "dense", [{}, {"config": "quickstart", "checkpoint": "a"}, {"checkpoint": ""}]
)
def test_a_study_has_one_dense_network(dense):
    with pytest.raises(UsageError, match=r"either `config` .*`checkpoint`"):
        Study(smaller={"a": HALF}, **dense)


def save_small(path, **info):
    """Saves a checkpoint of a small network with this information."""
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), (12, 12, 1))
    preprocessing = ij.Preprocessing((12, 12, 1), (0.5,), (0.25,))
    metadata = ij.Metadata(preprocessing=preprocessing, info=info)
    ij.save_checkpoint(path, model, variables, metadata=metadata)
    return str(path)


RECORDED = {"source": "npz:own.npz", "crop_padding": 1, "flip": False}


def test_a_study_of_a_checkpoint_says_what_data_it_takes(tmp_path):
    trained = save_small(tmp_path / "trained", config={"data": RECORDED})
    workdir = tmp_path / "w"
    study = Study(
        checkpoint=trained, smaller={"a": HALF}, control=True, against=("onnx",)
    )
    for data in (None, "npz:given.npz"):
        stages = make_stages(study, workdir, data=data)
        assert [s.verb for s in stages] == [
            *("compress", "finetune", "finetune", "benchmark", "report")
        ]
        assert [s.command[1] for s in stages[:3]] == [
            *(trained, str(workdir / "a"), trained)
        ]
        for stage in stages:
            option = "--data.source" if stage.verb == "finetune" else "--data"
            where = stage.command.index(option)
            assert stage.command[where + 1] == (data or "npz:own.npz")


def test_a_study_of_a_run_keeps_to_its_best_checkpoint(tmp_path):
    saved = tmp_path / "run" / "checkpoints" / "step_00000001"
    saved.parent.mkdir(parents=True)
    save_small(saved, config={"data": RECORDED})
    study = Study(checkpoint=str(tmp_path / "run"), smaller={"a": HALF}, teacher=True)
    for stage in make_stages(study, tmp_path / "w"):
        assert str(saved) in stage.command


@pytest.mark.parametrize("data", [None, "npz:given.npz"])
def test_a_checkpoint_that_says_too_little_is_refused(data, tmp_path):
    imported, workdir = save_small(tmp_path / "imported"), tmp_path / "w"

    def refused(checkpoint, **options):
        study = Study(checkpoint=str(checkpoint), smaller={"a": HALF}, **options)
        with pytest.raises(UsageError) as raised:
            run_study(study, workdir, data=data)
        assert not workdir.exists()
        return str(raised.value)

    assert "nowhere" in refused(tmp_path / "nowhere")
    if data is None:
        assert "imported does not say" in (said := refused(imported))
        assert "--data" in said
        return
    said = refused(imported, control=True, finetune=("--data.flip", "True"))
    assert "--data.crop-padding" in said and "control" in said
    told = ("--data.flip", "True", "--data.crop-padding", "4")
    study = Study(checkpoint=imported, smaller={"a": HALF}, control=True, finetune=told)
    assert make_stages(study, workdir, data=data)


@pytest.mark.parametrize("name", ["a", "a_finetuned", "control", "report.json"])
def test_nothing_is_written_over_the_dense_network(name, tmp_path):
    checkpoint = save_small(tmp_path / name, config={"data": RECORDED})
    study = Study(checkpoint=checkpoint, smaller={"a": HALF}, control=True)
    with pytest.raises(UsageError, match=f"{name} would be written twice"):
        run_study(study, tmp_path)
    assert make_stages(study, tmp_path / "w")


def test_two_networks_have_two_places(tmp_path):
    smaller = {"a": HALF, "a_finetuned": HALF}
    with pytest.raises(UsageError, match="a_finetuned would be written twice"):
        make_stages(Study(config="quickstart", smaller=smaller), tmp_path)


def test_rows_of_a_checkpoint_s_study_have_its_names(tmp_path):
    """The dense network's place may have any name."""
    stages, subjects = [], []
    runs = (tmp_path / "half_finetuned", tmp_path / "w" / "half_finetuned")
    for name, run in zip(("dense", "half"), runs, strict=True):
        file = tmp_path / f"{name}.ijx"
        file.write_bytes(b"x" * (1 + len(stages)))
        stages.append(Stage("", ("export",), file, (run,)))
        subject = dict.fromkeys(
            ("checkpoint", "form", "top1", "difference", "margin_95", "cycles"), None
        )
        subject |= {"sha256": name, "latency_ms": {"1": {"median_ms": 1.0}}}
        subject |= {"evaluation": {"num_examples": 10}}
        subjects.append(
            subject | {"cost": {"params": 1, "total_macs": 2, "dense_macs": 4}}
        )
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"subjects": subjects}))
    stages.append(Stage("", ("report",), report, runs))
    rows = studies._rows(stages)
    assert [row["network"] for row in rows] == ["dense", "half"]
    assert [row["file_bytes"] for row in rows] == [1, 2]


def test_only_some_are_made(tmp_path):
    smaller = {"a": HALF, "b": Smaller((), start="a"), "c": HALF}
    study = Study(smaller=smaller, config="quickstart")
    made = make_stages(study, tmp_path, only=("b", "a"))
    assert [stage.out.name for stage in made if stage.verb == "compress"] == ["a", "b"]
    for only, named in ((("b",), "b without a"), (("cc",), "did you mean")):
        with pytest.raises(UsageError) as raised:
            run_study(study, tmp_path / "w", only=only)
        assert named in str(raised.value).lower()
    assert not (tmp_path / "w").exists()


def test_what_another_command_made_is_kept_and_named(tmp_path, monkeypatch):
    study = Study(smaller={"a": HALF}, config="quickstart")
    (tmp_path / "a").mkdir()
    made = {"a": ["compress", "dense", "--ranks", "budget:macs=0.4", "--out", "a"]}
    (tmp_path / "commands.json").write_text(json.dumps(made))
    monkeypatch.setattr(studies, "_run", lambda stage: pytest.fail(stage.what))
    with pytest.raises(UsageError) as raised:
        run_study(study, tmp_path)
    assert "macs=0.4" in str(raised.value) and "macs=0.5" in str(raised.value)
    # What stands there without a record is the user's own, and is taken.
    (tmp_path / "commands.json").unlink()
    stages = make_stages(study, tmp_path)
    assert stages[1].is_complete() and not stages[0].is_complete()


def test_files_of_another_command_are_made_again(tmp_path, monkeypatch):
    study = Study(smaller={"a": HALF}, config="quickstart", export=())
    ran = []

    def run(stage):
        ran.append(stage.out.name)
        return 0, {}

    monkeypatch.setattr(studies, "_run", run)
    monkeypatch.setattr(Stage, "is_complete", lambda stage: True)
    monkeypatch.setattr(studies, "_rows", lambda stages: [])
    run_study(study, tmp_path)
    assert ran == []
    report = ["report", "dense", "--out", "report"]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps({"report.json": report, "a.ijx": ["export", "b"]}))
    run_study(study, tmp_path)
    assert ran == ["a.ijx", "report.json"]
    made = json.loads(file.read_text())
    assert made["report.json"] != report and made["a.ijx"][:2] == [
        *("export", "a_finetuned")
    ]
    run_study(study, tmp_path)
    assert ran == ["a.ijx", "report.json"]


def test_a_stage_that_ends_without_its_run_is_an_error(tmp_path, monkeypatch):
    study = Study(smaller={"a": HALF}, config="quickstart")
    monkeypatch.setattr(studies, "_run", lambda stage: (0, {"stopped_by": None}))
    with pytest.raises(UsageError, match="has ended, and .*dense is not whole"):
        run_study(study, tmp_path)


def test_a_stage_that_a_signal_stopped_is_said(tmp_path, monkeypatch):
    study = Study(smaller={"a": HALF}, config="quickstart")
    monkeypatch.setattr(studies, "_run", lambda stage: (0, {"stopped_by": 15}))
    assert run_study(study, tmp_path).stopped_by == 15


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_description_is_no_run_that_ended_early(
    content, tmp_path, monkeypatch
):
    saved = tmp_path / "step_00000002"
    saved.mkdir()
    (saved / "metadata.json").write_text(content)
    record = {
        "curve": [{"epoch": 1, "step": 2}],
        "config": {"epochs": 5, "early_stopping": 1},
    }
    monkeypatch.setattr(studies, "make_record", lambda run: record)
    monkeypatch.setattr(studies, "last_checkpoint", lambda run: saved)
    assert not Stage("", ("fit",), tmp_path).is_complete()


def test_the_table_has_what_is_known():
    row = {
        **dict.fromkeys(("file_bytes", "cycles"), None),
        **{"network": "dense", "top1": 0.9, "difference": 0.0, "margin_95": 0.0},
        "untuned": None,
        **{"num_examples": 200, "params": 1000, "macs": 2000, "share_of_dense": 1.0},
        "times_ms": {"jax": {"1": 2.0}},
    }
    small = row | {"network": "small", "difference": -0.0125, "margin_95": 0.01}
    small |= {"untuned": {"raw": 0.1, "recalibrated": 0.8725}}
    small |= {"times_ms": {"torch": {"1": 1.0}, "jax": {"1": 1.5}}}
    table = format_networks([row, small])
    assert "-1.25 +-1.00" in table and "87.25%" in table and "10.00%" not in table
    assert "one is 0.50 points" in table
    assert re.search(r"jax, 1 +torch, 1", table)
    assert "cycles" not in table and "file" not in table
    other = small | {"difference": None, "margin_95": None}  # of other test images
    assert "+-" not in format_networks([row, other])
    full = [{**r, "file_bytes": 2_500_000, "cycles": 7000} for r in (row, small)]
    table = format_networks(full, "v5e")
    assert "2.50 MB" in table and "7,000" in table and "not measured" in table
