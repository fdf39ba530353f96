"""The augmentation of the images that BatchNorm is recalibrated on."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import shared_file
from flax import linen as nn
from helpers import fit_digits

import inertia_jax as ij
from inertia_jax.metadata import Preprocessing
from train.__main__ import main
from train.compress.augmentation import augmentation_of, in_words, with_augmentation
from train.compress.options import Compress
from train.errors import UsageError
from train.networks import TrainedNetwork

PREPROCESSING = Preprocessing((8, 8, 1), (0.5,), (0.25,))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(recorded=None, *, norm=True):
    stats = {"bn": {"mean": np.zeros(2), "var": np.ones(2)}} if norm else {}
    info = {"config": {"data": recorded}} if recorded else {}
    variables = {"params": {}, "batch_stats": stats}
    return TrainedNetwork(
        pathlib.Path("there"), nn.Dense(1), PREPROCESSING, (), info, variables
    )


def options(**given):
    return Compress("checkpoint", "out", ranks="evbmf", data="digits", **given)


def test_the_checkpoints_own_augmentation_is_used():
    recorded = {"crop_padding": 2, "flip": False, "crop_mode": "reflect"}
    used = augmentation_of(options(), network(recorded))
    assert (used.crop_padding, used.crop_mode, used.flip) == (2, "reflect", False)
    filled = with_augmentation(options(), network(recorded))
    assert (filled.crop_padding, filled.flip, filled.resized_crop) == (2, False, False)
    # Once filled in, they are what they were.
    assert augmentation_of(filled, network(recorded)) == used
    assert with_augmentation(filled, network(recorded)) == filled
    said = in_words(options(), network(recorded))
    assert "padded by 2 (reflect), not mirrored, as the checkpoint says" in said
    said = in_words(options(crop_padding=0, flip=True), network(recorded))
    assert "not cropped, mirrored, as the options say" in said
    resized = network({**recorded, "resized_crop": True})
    assert "random parts" in in_words(options(), resized)
    assert with_augmentation(options(), resized).resized_crop
    with pytest.raises(UsageError, match=r"`crop_padding` \(=3\) does nothing"):
        with_augmentation(options(crop_padding=3), resized)


@pytest.mark.parametrize(
    "given",
    [{}, {"flip": True}, {"crop_padding": 4}, {"resized_crop": True}],
)
def test_nothing_is_guessed(given):
    for silent in (network(), network({"source": "digits"})):
        with pytest.raises(UsageError, match="--crop-padding and --flip"):
            with_augmentation(options(**given), silent)
    # Where nothing depends on it, nothing is asked.
    unused = options(recalibration_images=0, **given)
    assert with_augmentation(unused, network()) == unused
    assert with_augmentation(options(**given), network(norm=False)).flip in (True, None)
    for needs in ({"reconstruction_images": 8}, {"finetune_epochs": 1}):
        with pytest.raises(UsageError, match="--crop-padding and --flip"):
            with_augmentation(options(**needs, **given), network(norm=False))


def test_options_say_it_for_imported_networks():
    for given in (
        {"crop_padding": 4, "flip": True},
        {"resized_crop": True, "flip": False},
    ):
        used = augmentation_of(options(**given), network())
        assert {name: getattr(used, name) for name in given} == given
        filled = with_augmentation(options(**given), network())
        assert {name: getattr(filled, name) for name in given} == given


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_recalibrating_a_dense_network_loses_nothing(tmp_path, capsys):
    run, record = tmp_path / "run", tmp_path / "record.json"
    model = ["--model.name", "resnet20", "--model.width", "0.4"]
    fit_digits(run, *model, "--data.crop-padding", "2")

    def recalibrated(*options):
        # No layer gets cheaper at full rank, so that every layer stays.
        arguments = ["--ranks", "ratio:1.0", "--no-weigh", "--record", str(record)]
        out = tmp_path / f"out{len(options)}"
        arguments += ["--out", str(out), *options]
        assert main(["compress", str(run), *arguments]) == 0
        (test,) = json.loads(record.read_text())["tests"]
        stats = ij.load_checkpoint(out)[1]["batch_stats"]
        return test["stages"]["recalibrated"]["difference"], jax.tree.leaves(stats)

    own, own_stats = recalibrated("--recalibration-images", "1024")
    assert "padded by 2 (zeros), not mirrored, as the checkpoint" in (
        capsys.readouterr().out
    )
    _, plain_stats = recalibrated(
        "--recalibration-images", "1024", "--crop-padding", "0"
    )
    assert "not cropped" in capsys.readouterr().out
    assert own > -0.02
    # So short a training does not say which is better; the real network's test does.
    assert not all(map(np.array_equal, own_stats, plain_stats))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_real_resnet20_is_recalibrated_as_it_was_trained(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    weights = shared_file("weights/resnet20_cifar10.pth")
    unpack = shared_file("data/unpack.py")
    name = "cifar10_exact_subset"
    subprocess.run([sys.executable, unpack, tmp_path, name], check=True)
    data = f"npz:{tmp_path}/{name}.npz"
    checkpoint, record = tmp_path / "resnet20", tmp_path / "record.json"
    imported = ["import", str(weights), "--model", "resnet20", "--out", str(checkpoint)]
    imported += ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    assert main(imported) == 0
    arguments = ["compress", str(checkpoint), "--ranks", "ratio:1.0", "--no-weigh"]
    arguments += ["--data", data, "--record", str(record)]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "say it with --crop-padding and --flip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--crop-padding", "4", "--flip", "True"]) == 0
    (test,) = json.loads(record.read_text())["tests"]
    found = test["stages"]["recalibrated"]["difference"]
    # Plain images lose some four points, and crops padded after normalising five.
    assert round(test["top1_before"] * 1017) == 933
    assert abs(found) < 0.005
    assert re.search("padded by 4 .zeros., mirrored, as the o", capsys.readouterr().out)
