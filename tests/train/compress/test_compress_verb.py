"""Compressing a checkpoint to Tucker-2 factors, from the command line."""

import json
import re
import shlex
import signal

import jax
import numpy as np
import pytest
from helpers import evaluate, fit_digits

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.compress.layer_report import report_layers
from train.compress.rank_rules import parse_ranks
from train.data import Split
from train.data.augment import Augmentation
from train.data.training_inputs import training_inputs
from train.errors import UsageError
from train.fit.stop import StopSignal

pytestmark = pytest.mark.usefixtures("one_device")
IMAGES = ["--calibration-images", "64", "--recalibration-images", "128"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dense network that knows some digits."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    return fit_digits(workdir, "--model.name", "resnet20", "--model.width", "0.4")


@pytest.fixture(scope="module")
def compressed(run, tmp_path_factory):
    """The checkpoint at 0.7 of the MACs, and its record."""
    out = tmp_path_factory.mktemp("compressed") / "checkpoint"
    record = out.with_name("record.json")
    arguments = ["--ranks", "budget:macs=0.7", "--latency-batch", "2", *IMAGES]
    arguments += ["--out", str(out), "--record", str(record)]
    assert main(["compress", str(run), *arguments]) == 0
    return out, json.loads(record.read_text())


@pytest.mark.slow
def test_the_record_says_what_the_checkpoint_is(compressed, tmp_path):
    out, record = compressed
    model, _ = ij.load_checkpoint(out)
    cost = ij.count_cost(model, (8, 8, 1))
    assert record["macs"] == cost.macs <= 0.7 * record["dense_macs"]
    assert record["params"] == cost.params
    assert record["plan"] == json.loads(model.plan.to_json()) != []
    (test,) = record["tests"]
    assert set(test["stages"]) == {"raw", "recalibrated"}
    found = evaluate(out, tmp_path)
    assert found["top1"] == test["stages"]["recalibrated"]["top1"]
    assert test["num_examples"] == found["num_examples"]
    # Recalibration is what makes it usable again.
    assert test["stages"]["raw"]["top1"] < test["stages"]["recalibrated"]["top1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["--ranks", "ratio:0.3"],
        ["--macs", "0.97", "--layers", "layer1_0*"],
    ],
)
def test_kernels_are_fitted_to_the_dense_layers(run, how, tmp_path):
    out, record = tmp_path / "fitted", tmp_path / "record.json"
    arguments = [*how, *IMAGES, "--reconstruction-images", "256", "--out", str(out)]
    assert main(["compress", str(run), *arguments, "--record", str(record)]) == 0
    (test,) = json.loads(record.read_text())["tests"]
    stages = list(test["stages"])
    assert stages[-1] == "reconstructed"
    assert test["stages"]["reconstructed"]["top1"] == evaluate(out, tmp_path)["top1"]
    if how[0] == "--ranks":
        top1 = [test["stages"][stage]["top1"] for stage in stages]
        assert stages == ["raw", "recalibrated", "reconstructed"]
        assert top1[0] < top1[1] < top1[2] - 0.2


@pytest.mark.slow
def test_evaluation_beside_another_checkpoint(compressed, run, tmp_path, capsys):
    out, record = compressed
    file = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(out), "--against", str(run), "--out", str(file)]
    assert main(arguments) == 0
    found = json.loads(file.read_text())
    stage = record["tests"][0]["stages"]["recalibrated"]
    assert found["against"] == record["tests"][0]["top1_before"]
    assert found["difference"] == stage["difference"]
    assert found["margin_95"] == stage["margin_95"]
    assert f"{100 * found['difference']:+.2f} points" in capsys.readouterr().out


@pytest.mark.slow
def test_layer_rows_add_up(compressed):
    _, record = compressed
    rows = record["layers"]
    assert len(rows) == 19
    for row in rows:
        assert row["latency_ms"][0] > 0
        assert row["latency_ms"][1] > 0
        if row["ranks"]:
            assert 0 < row["energy"] < 1
            assert row["macs"][1] < row["macs"][0]
        else:
            assert row["energy"] == pytest.approx(1)
            assert row["macs"][0] == row["macs"][1]
    dense = sum(row["macs"][0] for row in rows)
    saved = sum(row["macs"][0] - row["macs"][1] for row in rows)
    assert record["dense_macs"] - saved == record["macs"]
    assert dense < record["dense_macs"]  # the linear layer is no convolution


@pytest.mark.slow
def test_the_table_has_a_row_a_layer(run, tmp_path, capsys):
    arguments = ["--ranks", "ratio:0.5", "--no-weigh", "--recalibration-images", "0"]
    out = tmp_path / "out"
    assert main(["compress", str(run), *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    row = re.search(r"layer1_0/conv1 +3x3x6x6 +3,3 +(0\.\d+) +(.*)", printed)
    assert row is not None
    assert "324 -> 117" in row[2]
    assert "layer3_2/conv2" in printed
    assert re.search(
        r"network: [\d,]+ -> [\d,]+ parameters, [\d,]+ -> [\d,]+ MACs", printed
    )
    assert "raw" in printed
    assert "recalibrated" not in printed
    assert " ms" not in printed


@pytest.mark.slow
def test_hooi_keeps_the_ranks_of_a_ratio_in_1x1_layers(tmp_path):
    model = ij.create_model("resnet18", width=0.25)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    preprocessing = Preprocessing((8, 8, 3), (0.5,) * 3, (0.2,) * 3)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    ij.save_checkpoint(checkpoint, model, variables, metadata=Metadata(preprocessing))
    arguments = ["--ranks", "ratio:0.2", "--method", "hooi", "--layers", "*shortcut_0"]
    assert main(["compress", str(checkpoint), *arguments, "--out", str(out)]) == 0
    # `max(1, int(channels * ratio))`: one is twice the other, of 1 x 1 filters.
    ranks = {path: (s.rank_in, s.rank_out) for path, s in read_rules(out)}
    assert list(ranks.values()) == [(3, 6), (6, 12), (12, 25)]


def read_rules(checkpoint):
    return ij.load_checkpoint(checkpoint)[0].plan.rules


@pytest.mark.slow
def test_a_compressed_checkpoint_compresses_again_and_is_tuned(compressed, tmp_path):
    out, _ = compressed
    again, record = tmp_path / "again", tmp_path / "record.json"
    arguments = ["--ranks", "budget:macs=0.4", "--no-weigh", "--out", str(again)]
    arguments += ["--finetune-epochs", "2", "--record", str(record), *IMAGES]
    assert main(["compress", str(out), *arguments]) == 0
    model, _ = ij.load_checkpoint(again)
    cost = ij.count_cost(model, (8, 8, 1))
    assert cost.macs <= 0.4 * cost.dense_macs
    (test,) = json.loads(record.read_text())["tests"]
    assert list(test["stages"]) == ["raw", "recalibrated", "fine-tuned"]
    tuned = evaluate(tmp_path / "again_finetuned", tmp_path)
    assert tuned["top1"] == test["stages"]["fine-tuned"]["top1"]
    config = json.loads((tmp_path / "again_finetuned" / "config.json").read_text())
    assert config["teacher"] == str(out)
    # Two epochs at a low rate learn what factors at 0.4 of the MACs had lost.
    assert tuned["top1"] > max(0.5, test["stages"]["recalibrated"]["top1"])
    steps = (tmp_path / "again_finetuned" / "checkpoints").glob("step_*")
    assert ij.load_checkpoint(next(steps))[0].plan == model.plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ranks .* or --macs .* must be given"),
        (["--ranks", "ratio:0.5", "--macs", "0.5"], "only one of"),
        (["--macs", "0.5", "--method", "hooi"], "must be inertial with --macs"),
        (
            ["--ranks", "evbmf", "--reconstruction-images", "1"],
            r"`reconstruction_images` \(=1\) must be 0 or >= 8",
        ),
        (["--ranks", "evbmf", "--method", "inertial"], "must be hosvd or hooi"),
        (["--ranks", "budget:macs=0.001"], "must be at least 0\\.\\d+"),
        (["--ranks", "ratio:1.5"], "`ratio` .*must be in \\(0, 1\\]"),
        (["--ranks", "ratio:0.5", "--layers", "fc*"], "matches no convolution"),
        (["--ranks", "ratio:0.5", "--tile-size", "4"], "`tile_size` .*does nothing"),
        (["--macs", "0.8", "--round-to", "8"], "`round_to` .*does nothing with --macs"),
        (["--ranks", "ratio:0.5", "--latency-batch", "-1"], "`latency_batch` .*>= 0"),
        (["--ranks", "budget:latency=1", "--device", "v5"], "must be one of v4, v5e"),
        (["--macs", "0.8", "--device", "v5e"], "`device` .*does nothing with --macs"),
        (["--ranks", "half"], "`ranks` .=half. must be"),
        (["--ranks", "ratio:0.5", "--round-to", "0"], "`round_to` .=0. must be >= 1"),
        (["--macs", "0.8", "--channel-stride", "0"], "`channel_stride` .* >= 1"),
        (["--macs", "0.8", "--tile-size"], "`tile_size` must be one number, or"),
        (["--macs", "0.8", "--layers", "fc?"], r"no convolution of .*'conv1', 'layer1"),
        (["--macs", "0.8", "--tile-size", "4", "1"], "`tile_size` .=1. must be >= 2"),
        (["--macs", "80"], "`macs` .=80.0. must be in .0, 1."),
        (["--macs", "0.9", "--seed", "-1"], "`seed` .* must be >= 0"),
        (["--macs", "0.9", "--crop-padding", "-1"], "`crop_padding` .* must be >= 0"),
        (["--macs", "0.9", "--finetune-learning-rate", "-1"], "must be > 0"),
        (
            ["--macs", "0.9", "--finetune-learning-rate", "0.5"],
            "does nothing without `finetune_epochs`",
        ),
        (
            ["--macs", "0.9", "--finetune-batch-size", "16"],
            "`finetune_batch_size` .* does nothing without `finetune_epochs`",
        ),
        (["--macs", "0.9", "--finetune-batch-size", "0"], "must be >= 1"),
        (
            ["--macs=0.9", "--finetune-epochs=1", "--finetune-batch-size=2000"],
            "`finetune_batch_size` .=2000. must be at most 1437",
        ),
    ],
)
def test_what_cannot_be_compressed(run, arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(run), *arguments, "--out", str(out), *IMAGES]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert not out.exists()
    # What options say by themselves is said before anything is evaluated.
    assert "evaluating" not in said or "budget:macs" in arguments[1]


def test_rules_are_read_as_they_are_written(tmp_path):
    assert parse_ranks("ratio:0.2") == ij.Ratio(0.2)
    assert parse_ranks("energy:0.9") == ij.Energy(0.9)
    assert parse_ranks("evbmf") == ij.Evbmf()
    assert parse_ranks("budget:macs=0.5") == ij.Budget(macs=0.5)
    assert parse_ranks("budget:params=0.5") == ij.Budget(params=0.5)
    assert parse_ranks("budget:latency=0.5") == ij.Budget(latency=0.5)
    plan = ij.Plan((("layer1*", ij.Tucker2(2, 3)), ("*", ij.Conv())))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert parse_ranks(f"plan:{tmp_path}/plan.json") == plan
    for text in (
        "ratio",
        "ratio:x",
        "budget:flops=1",
        "evbmf:1",
        "plan:nowhere",
        "svd",
    ):
        with pytest.raises(UsageError, match=f"`ranks` .={re.escape(text)}"):
            parse_ranks(text)
    for text, near in (("buget:macs=1", "budget"), ("budget:mac=1", "macs")):
        with pytest.raises(UsageError, match=rf"Did you mean {near}\?"):
            parse_ranks(text)


@pytest.mark.slow
def test_energy_is_what_the_factors_keep_of_the_kernel(run):
    checkpoint = next((run / "checkpoints").glob("step_*"))
    dense = ij.load_checkpoint(checkpoint)
    small = ij.compress(*dense, ranks=ij.Ratio(0.5), image_shape=(8, 8, 1))
    rows = {r.path: r for r in report_layers(dense, small, (8, 8, 1), latency_batch=0)}
    row = rows["layer2_1/conv2"]
    assert row.latency_ms is None
    kernel = np.asarray(dense[1]["params"]["layer2_1"]["conv2"]["kernel"], np.float64)
    parts = small[1]["params"]["layer2_1"]["conv2"]
    # Orthonormal factors: what is kept is the energy of the core.
    core = np.asarray(parts["core"]["kernel"], np.float64)
    np.testing.assert_allclose(
        row.energy, np.sum(core**2) / np.sum(kernel**2), rtol=1e-5
    )


def test_training_inputs_come_in_the_order_of_the_draw():
    images = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 1), np.uint8
    )
    split = Split(images, np.zeros(40, np.int32))
    preprocessing = Preprocessing((2, 2, 1), (0.0,), (1.0,), None)
    plain = Augmentation.plain(preprocessing, "float32")
    seen = training_inputs(split, plain, 20, seed=3)
    numbers = np.rint(seen[:, 0, 0, 0] * 255).astype(int)
    assert len(set(numbers)) == 20
    # Sets may lie class by class: batches must not.
    assert list(numbers) != sorted(numbers)


@pytest.mark.slow
def test_fine_tuning_that_was_stopped_goes_on(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--ranks", "ratio:0.5", "--no-weigh", *IMAGES, "--out", str(out)]
    arguments += ["--finetune-epochs", "2", "--seed", "3", "--cache-dir", str(tmp_path)]
    arguments += ["--record", str(tmp_path / "record.json")]
    first = StopSignal.after_call
    calls = iter(range(10**6))

    def stop_at_the_third(self):
        return signal.SIGTERM if next(calls) == 2 else first(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "after_call", stop_at_the_third)
        assert main(["compress", str(run), *arguments]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "stopped and saved at step 3" in said[-2]
    command = shlex.split(said[-1])
    assert command[1:3] == ["-m", "train"]
    other = [*command[3:], "--layers", "layer3*"]
    assert main(other) == 2
    assert "is not of this compression" in capsys.readouterr().err
    record = tmp_path / "record.json"
    assert main([*command[3:]]) == 0
    printed = capsys.readouterr()
    assert "step 3 of 22" in printed.out + printed.err
    # All that a compression that was not stopped prints and records.
    assert re.search(r"layer1_0/conv1 +3x3x6x6 +3,3", printed.out)
    assert re.search(r"network: [\d,]+ -> [\d,]+ parameters", printed.out)
    assert re.search(
        r"before, raw [\d.]+% .*, recalibrated [\d.]+% .*, fine-tuned [\d.]+% ",
        printed.out,
    )
    (test,) = json.loads(record.read_text())["tests"]
    assert list(test["stages"]) == ["raw", "recalibrated", "fine-tuned"]


@pytest.mark.slow
def test_layers_that_their_plan_left_dense_are_named(tmp_path, capsys):
    plan = ij.Plan((("layer2_0/conv1", ij.Inertial(3, 4, reading="tiled")),))
    model = ij.create_model("resnet20", width=0.25, plan=plan)
    variables = ij.init_variables(model, jax.random.key(0))
    preprocessing = Preprocessing((32, 32, 3), (0.5,) * 3, (0.2,) * 3)
    checkpoint, rules = tmp_path / "checkpoint", tmp_path / "rules.json"
    ij.save_checkpoint(checkpoint, model, variables, metadata=Metadata(preprocessing))
    rules.write_text(ij.Plan((("layer1_0/conv1", ij.Tucker2(2, 2)),)).to_json())
    arguments = ["--ranks", f"plan:{rules}", "--out", str(tmp_path / "out")]
    assert main(["compress", str(checkpoint), *arguments]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "layer2_0" in line]
    assert "layer2_0/conv1 stays dense: tiles need stride 1, it has 2" in said


@pytest.mark.slow
def test_a_fine_tuning_that_was_killed_names_the_command_that_goes_on(tmp_path, capsys):
    checkpoint, out = tmp_path / "run", tmp_path / "out"
    (checkpoint / "arrays").mkdir(parents=True)
    out.mkdir()
    options = ["compress", str(checkpoint), "--out", str(out), "--ranks", "ratio:0.5"]
    assert main([*options, "--finetune-epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert "must not exist; nothing was changed. If its fine-tuning was ended" in error
    assert error.rstrip().endswith("--ranks ratio:0.5 --finetune-epochs 1 --resume")
    assert main(options) == 2
    assert "--resume" not in capsys.readouterr().err
