"""Compressing a checkpoint, training it further, and the gate rates on the way."""

import re

import numpy as np
import pytest
from helpers import DIGITS, evaluate, fit_digits, last_checkpoint, read_metrics

import inertia_jax as ij
from train.__main__ import main

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


def test_init_of_another_network_is_refused(run, tmp_path, capsys):
    arguments = ["fit", *DIGITS, *LENET, "--init", str(last_checkpoint(run))]
    workdir = tmp_path / "run"
    wider = ["--model.width", "0.3", "--workdir", str(workdir)]
    assert main([*arguments, *wider]) == 2
    assert "has another network" in capsys.readouterr().err
    assert not (workdir / "config.json").exists()
