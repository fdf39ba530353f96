"""`python -m train import`: checkpoints from PyTorch weights."""

import re

import jax
import numpy as np
import own_cnn
import pytest
from conftest import shared_file
from flax.traverse_util import flatten_dict
from helpers import exact_cifar10
from safetensors.numpy import save_file

import inertia_jax as ij
from inertia_jax.weights.layout import transposed
from train.__main__ import main
from train.networks import read_network

STATISTICS = ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")


@pytest.fixture
def lenet(tmp_path):
    """A narrow network, its state dict, and the command that imports a file of it."""
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0))
    command = ["import", str(tmp_path / "weights.ckpt"), "--model", "lenet"]
    command += ["--width", "0.1", "--mean", "0.13", "--std", "0.31"]
    command += ["--out", str(tmp_path / "checkpoint")]
    return variables, ij.to_torch(model, variables), command


def test_parts_of_keys_are_renamed(lenet, tmp_path, capsys):
    variables, state, command = lenet
    foreign = {f"model.{k.replace('fc2', 'head')}": v for k, v in state.items()}
    save_file(foreign, tmp_path / "weights.ckpt")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "likely head=fc2 (`rename`), of 2 keys" in error
    assert "missing" not in error
    assert main([*command, "--rename", "head"]) == 2
    assert "`rename` (='head') must be OLD=NEW" in capsys.readouterr().err
    assert main([*command, "--rename", "head=fc2", "head=fc1"]) == 2
    assert "second name for 'head'" in capsys.readouterr().err
    assert main([*command, "--rename", "head=fc2"]) == 0
    _, loaded = ij.load_checkpoint(tmp_path / "checkpoint")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_what_no_weights_are_read_for_is_refused_by_its_option(lenet, tmp_path, capsys):
    _, _, command = lenet
    for options, message in (
        (
            ["--mean", "33.3"],
            r"`mean` (=(33.3,)) must be at most 1: pixels are in [0, 1]",
        ),
        (["--std", "78.6"], "divide what is of 0 to 255 by 255"),
        (["--model", "lenet5"], "`model` (='lenet5') must be one of"),
        (["--out", str(tmp_path)], f"`out` (={tmp_path}) must not exist"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_of_another_network_are_told_what_decides_it(lenet, tmp_path, capsys):
    _, state, command = lenet
    save_file(state, tmp_path / "weights.ckpt")
    assert main([*command, "--num-classes", "7"]) == 2
    error = capsys.readouterr().err
    assert "do not fit lenet with `num_classes` (=7), `width` (=0.1) (2 keys)" in error


def test_averaged_weights_are_taken_if_asked_for(lenet, tmp_path, capsys):
    variables, state, command = lenet
    both = {f"model.{key}": value for key, value in state.items()}
    both |= {f"ema.{key}": value + 1 for key, value in state.items()}
    save_file(both, tmp_path / "weights.ckpt")
    assert main([*command, "--ema"]) == 0
    assert "the weights at `ema` are taken, not those" in capsys.readouterr().out
    _, loaded = ij.load_checkpoint(tmp_path / "checkpoint")
    averaged = jax.tree.map(lambda leaf: leaf + 1, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, averaged)


def test_numbers_that_no_network_computes_with_are_refused(lenet, tmp_path, capsys):
    _, state, command = lenet
    state["fc1.bias"][0] = np.inf
    save_file(state, tmp_path / "weights.ckpt")
    assert main(command) == 2
    assert "fc1.bias holds NaN or infinity 1 times" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "model", "correct"),
    [
        ("resnet32-d509ac18.th", "resnet32", 944),
        ("resnet56-4bfd9763.th", "resnet56", 943),
    ],
)
def test_published_files_go_in_with_one_command(file, model, correct, tmp_path, capsys):
    weights = shared_file(f"weights/{file}")
    out = str(tmp_path / "checkpoint")
    command = ["import", str(weights), "--model", model, *STATISTICS]
    assert main([*command, "--out", out]) == 0
    assert main(["evaluate", out, "--data", exact_cifar10(tmp_path)]) == 0
    assert f"({correct} of 1,017)" in capsys.readouterr().out


def as_torch(variables):
    """Returns variables of `own_cnn` under the names that they have in PyTorch."""
    kinds = {"Conv": "conv", "BatchNorm": "bn", "Dense": "head"}
    leaves = {"mean": "running_mean", "var": "running_var", "bias": "bias"}
    state = {}
    for (_, layer, leaf), array in flatten_dict(variables).items():
        kind, number = layer.split("_")
        array = transposed(np.asarray(array), to_torch_layout=True)
        state[f"{kinds[kind]}{number}.{leaves.get(leaf, 'weight')}"] = array
    return state


def test_weights_of_another_network_go_into_one_s_own(tmp_path, capsys):
    model = own_cnn.make(7)
    variables = ij.init_variables(model, jax.random.key(0), (8, 8, 1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(size=leaf.shape).astype(np.float32), variables
    )
    file, out = tmp_path / "own.safetensors", tmp_path / "checkpoint"
    save_file(as_torch(variables), file)
    command = ["import", str(file), "--mean", "0.3", "--std", "0.3", "--out", str(out)]
    own = [*command, "--model.factory", "own_cnn:make", "--num-classes", "7"]
    sized = [*own, "--image-size", "8"]
    for words, message in (
        (command, "`model` (=None) or `model.factory` (=None) must be given"),
        ([*sized, "--model", "lenet"], "must be given, and one of them alone"),
        ([*command, "--model", "lenet", "--pairs", "a=b"], "without `model.factory`"),
        ([*sized, "--width", "2"], "`width` (=2.0) does nothing without `model`"),
        (own, "`image_size` (=None) must be given with `model.factory`"),
        ([*sized, "--flattened", "Dense_0=8by8"], "must be LAYER=SHAPE, e.g. Dense_0="),
        ([*sized, "--flattened", "Dense_0=4x4x8"], "Dense_0"),
        ([*sized, "--pairs", "Conv_0"], "`pairs` (='Conv_0') must be OURS=THEIRS"),
        ([*sized, "--pairs", "Conv_0=conv9"], "conv9"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert main([*sized, "--flattened", "*=None"]) == 0
    assert re.search("params/Dense_0/kernel +head0.weight", capsys.readouterr().out)
    network = read_network(out)
    assert network.model.factory == "own_cnn:make"
    jax.tree.map(np.testing.assert_array_equal, network.variables, variables)
