"""Compressing a checkpoint, training it further, and the gate rates on the way."""

import json
import re

import numpy as np
import pytest
from helpers import DIGITS, evaluate, fit_digits, last_checkpoint, read_metrics

import inertia_jax as ij
from inertia_jax.compression import inertial, tile_costs
from inertia_jax.compression.tile_costs import CostCurve
from train.__main__ import main
from train.verbs import compress as verb

LENET = ["--model.name", "lenet", "--model.width", "0.2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dense network that knows some digits."""
    return fit_digits(tmp_path_factory.mktemp("dense") / "run", *LENET)


def compress(run, out, *options):
    sizes = ["--calibration-images", "128", "--recalibration-images", "128"]
    arguments = ["--macs", "0.8", "--layers", "conv2", *sizes, *options]
    return main(["compress", str(run), "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def compressed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "checkpoint"
    assert compress(run, out) == 0
    return out


@pytest.mark.slow
def test_a_compressed_checkpoint_evaluates_by_itself(run, compressed, tmp_path, capsys):
    found = evaluate(compressed, tmp_path)
    printed = capsys.readouterr().out
    assert 0 < found["gate_rate/conv2"] < 1
    assert re.search(
        rf"Open gates by layer\n  conv2 +{found['gate_rate/conv2']:.3f}", printed
    )
    share = float(re.search(r"([\d.]+) of the dense network's", printed)[1])
    assert share < 0.85
    assert abs(found["top1"] - evaluate(run, tmp_path)["top1"]) < 0.2
    capsys.readouterr()
    assert compress(run, compressed) == 2
    assert "must not exist; nothing was changed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--macs", "0.01"], "must be at least 0\\.\\d+"),
        (["--layers", "fc*"], "matches no convolution"),
        (["--calibration-images", "1"], "`calibration_images` .*>= 2"),
    ],
)
def test_compress_says_what_it_cannot_do(run, options, message, tmp_path, capsys):
    assert compress(run, tmp_path / "out", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_finetuning_holds_the_rate_and_logs_it(compressed, tmp_path, capsys):
    workdir = tmp_path / "tuned"
    # On the data that the checkpoint names.
    arguments = ["finetune", str(compressed), "--epochs", "2", "--batch-size", "64"]
    arguments += ["--workdir", str(workdir)]
    assert main([*arguments, "--gate-budget", "0.5"]) == 2
    assert "`gate_gradient` (='ste')" in capsys.readouterr().err
    assert not workdir.exists()
    assert main([*arguments, "--model.width", "0.5"]) == 2
    assert "`model` " in capsys.readouterr().err
    assert main([*arguments, "--no-sync-batch-norm"]) == 2
    assert "`sync_batch_norm` (=False) must be on" in capsys.readouterr().err
    assert main(arguments) == 0
    model, _ = ij.load_checkpoint(compressed)
    target = model.plan.spec("conv2").threshold.target
    lines = read_metrics(workdir)
    trained = [line["gate_rate"] for line in lines if line["kind"] != "test"]
    # At most the share of each batch's tiles, and less than one tile short of it.
    np.testing.assert_allclose(trained, target, atol=1 / (64 * 4))
    tested = [line["gate_rate/conv2"] for line in lines if line["kind"] == "test"]
    found = evaluate(workdir, tmp_path)
    assert len(tested) == 2 and found["gate_rate/conv2"] in tested
    # The running threshold still comes from the network as it was.
    assert abs(tested[-1] - target) < 0.2


@pytest.mark.slow
def test_a_share_of_the_time_is_kept_and_measured_on_images(
    run, tmp_path, monkeypatch, capsys
):
    curve = CostCurve(8.0, (0.0, 1.0), (2.0, 9.0))
    monkeypatch.setattr(tile_costs, "layer_times", lambda *_, **__: curve)
    timed = []

    def network_times(networks, image_shape, *, batch_size, images, **_):
        timed.append((batch_size, images.shape))
        return [10.0, 7.5][: len(networks)]

    monkeypatch.setattr(inertial, "network_latencies_ms", network_times)
    monkeypatch.setattr(verb, "network_latencies_ms", network_times)
    out, record = tmp_path / "out", tmp_path / "record.json"
    options = ["--latency", "0.8", "--tile-size", "2", "3", "--latency-batch", "16"]
    options += ["--layers", "conv2", "--record", str(record)]
    sizes = ["--calibration-images", "64", "--recalibration-images", "64"]
    words = ["compress", str(run), "--out", str(out), *options, *sizes]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "10 -> 7.5 ms a call of 16 images, 0.750 of the time" in said
    assert "--latency 0.8 holds on the training images" in said
    assert json.loads(record.read_text())["latency_ms"] == [10.0, 7.5]
    assert set(timed) == {(16, (16, 8, 8, 1))}
    model, _ = ij.load_checkpoint(out)
    # 0.8 of 10 ms leave 6 ms to the layer.
    np.testing.assert_allclose(model.plan.spec("conv2").threshold.target, 4 / 7, 0.05)
    assert main([*words, "--resume"]) == 0
    assert "0.750 of the time" in capsys.readouterr().out
    assert main([*words, "--macs", "0.8"]) == 2
    assert "`macs` (=0.8) and `latency` (=0.8)" in capsys.readouterr().err


def test_init_of_another_network_is_refused(run, tmp_path, capsys):
    arguments = ["fit", *DIGITS, *LENET, "--init", str(last_checkpoint(run))]
    workdir = tmp_path / "run"
    wider = ["--model.width", "0.3", "--workdir", str(workdir)]
    assert main([*arguments, *wider]) == 2
    assert "has another network" in capsys.readouterr().err
    assert not (workdir / "config.json").exists()
