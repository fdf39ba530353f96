"""Weights narrower than float32: they train as their float32 copy does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Small,
    assert_bitwise_equal,
    final_arrays,
    make_config,
    read_metrics,
    relative,
    save_bright_digits,
    synthetic_set,
    take_steps,
)

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.config import Data, Model, Optimizer
from train.fit.teacher import hash_variables, load_teacher
from train.fit.trainer import Trainer
from train.step.state import TrainState, training_to_dict

PREPROCESSING = Preprocessing((8, 8, 1), (0.5,), (0.25,))
GATED = ij.Inertial(1, 3, threshold=ij.Rate(0.5), relative=True)


def narrowed(tree, dtype):
    """Returns real numbers in another type, integers as they are."""

    def convert(leaf):
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf).astype(dtype if is_real else leaf.dtype)

    return jax.tree.map(convert, jax.device_get(tree))


def types(tree):
    real = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return {str(leaf.dtype) for leaf in real}


def save_network(path, dtype):
    """Saves a checkpoint whose variables are of a type; returns the variables."""
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), PREPROCESSING.image_shape)
    variables = narrowed(variables, dtype)
    ij.save_checkpoint(path, model, variables, metadata=Metadata(PREPROCESSING))
    return variables


@pytest.fixture(scope="module", params=[1, 2])
def trainer(request):
    """A trainer of a network with gates, statistics and averages, and a first state."""
    config = dataclasses.replace(
        make_config(batch_size=16, steps_per_call=request.param),
        data=Data(source="synthetic", mean=(0.5,), std=(0.25,)),
        model=Model("lenet", width=0.1, plan=ij.Plan((("conv2", GATED),)).to_json()),
        optimizer=Optimizer(learning_rate=5e-4, ema_decay=0.5),
    )
    trainer = Trainer(config, synthetic_set(8, 1), jax.devices()[:1])
    return trainer, jax.device_get(trainer.init_state())


def trained(trainer, state):
    """Returns the state after four steps."""
    state = trainer.parallel.replicate(state)
    for inputs in trainer.inputs(0, 0):
        state, _ = trainer.train_call(state, inputs)
    return jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["init", "resume", "variables", "params"])
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_whatever_the_way_in_they_train_as_float32(trainer, way, dtype, tmp_path):
    trainer, first = trainer
    half = first.with_variables(narrowed(first.variables, dtype))
    copy = half.with_variables(narrowed(half.variables, "float32"))
    expected = trained(trainer, copy)
    if way == "init":
        path = tmp_path / "checkpoint"
        metadata = Metadata(trainer.preprocessing)
        ij.save_checkpoint(path, trainer.model, half.variables, metadata=metadata)
        trainer.config = dataclasses.replace(trainer.config, init=str(path))
        state = trainer.init_state()
    elif way == "resume":
        # As a run was saved that began in the narrow type.
        training = training_to_dict(half)
        training["opt_state"] = narrowed(training["opt_state"], dtype)
        arrays = {"variables": half.result, "training": training}
        state = trainer.restore(first, arrays)
    elif way == "variables":
        state = first.with_variables(half.variables)
    else:  # a caller of `Trainer` may put in what they like
        state = first.replace(
            params=half.params, collections=half.collections, averages=half.averages
        )
    found = trained(trainer, state)
    assert types(found) == {"float32"}
    if way in ("init", "resume"):  # the program's: wide before the first step
        assert types(state) == {"float32"}
        assert_bitwise_equal(found, expected)
    else:  # The first call is compiled for other inputs, and rounds otherwise.
        ours, theirs = (jax.flatten_util.ravel_pytree(s)[0] for s in (found, expected))
        assert relative(ours, theirs) < 1e-6
    # Steps far below the precision of either type move every weight.
    assert np.all(found.params["conv1"]["kernel"] != copy.params["conv1"]["kernel"])


@pytest.mark.slow
def test_a_network_with_narrow_parameters_of_its_own_learns_in_float32(monkeypatch):
    init = ij.init_variables
    monkeypatch.setattr(
        "helpers.ij.init_variables", lambda *args: narrowed(init(*args), "bfloat16")
    )
    for dtype in ("float32", "bfloat16"):
        first, last = take_steps(Small(dtype=dtype), 1, ema_decay=0.9)
        assert isinstance(first, TrainState)
        assert types(first) == types(last) == {"float32"}


@pytest.mark.slow
def test_a_float64_network_learns_narrower_weights_in_float64(x64):
    config = make_config(batch_size=16, name="lenet", width=0.1, steps_per_call=2)
    data = Data(source="synthetic", mean=(0.5,), std=(0.25,))
    config = dataclasses.replace(config, data=data)
    trainer = Trainer(config, synthetic_set(8, 1, num_train=32), jax.devices()[:1])
    first = jax.device_get(trainer.init_state())
    single = first.with_variables(narrowed(first.variables, "float32"))
    found = trained(trainer, single)
    assert types(found.variables) == types(found.opt_state) == {"float64"}
    copy = single.with_variables(narrowed(single.variables, "float64"))
    assert_bitwise_equal(found, trained(trainer, copy))


def test_a_narrow_teacher_answers_as_its_float32_copy(tmp_path):
    config = make_config(dtype="float32")
    found = {}
    for dtype in ("float16", "float32"):
        path = tmp_path / dtype
        variables = save_network(path, "float16")
        if dtype == "float32":
            model, variables = ij.load_checkpoint(path), narrowed(variables, dtype)
            path = tmp_path / "copy"
            metadata = Metadata(PREPROCESSING)
            ij.save_checkpoint(path, model[0], variables, metadata=metadata)
        config = dataclasses.replace(config, teacher=str(path))
        found[dtype] = load_teacher(config, PREPROCESSING, synthetic_set(8, 1))
        # A resumed run knows its teacher by what the file holds.
        assert found[dtype].sha256 == hash_variables(variables)
    ours, theirs = (found[dtype].variables for dtype in ("float16", "float32"))
    assert_bitwise_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", ["1", "2"])
def test_a_half_checkpoint_has_the_curve_of_its_copy(
    steps_per_call, tmp_path, one_device
):
    source = save_bright_digits(tmp_path / "set.npz", 64, 32, 8)
    curves, arrays = {}, {}
    save_network(tmp_path / "float16", "float16")
    model, variables = ij.load_checkpoint(tmp_path / "float16")
    ij.save_checkpoint(
        tmp_path / "float32",
        model,
        narrowed(variables, "float32"),
        metadata=Metadata(PREPROCESSING),
    )
    for dtype in ("float16", "float32"):
        workdir = tmp_path / f"run_{dtype}"
        command = ["finetune", str(tmp_path / dtype), "--data.source", source]
        command += ["--epochs", "2", "--batch-size", "8", "--workdir", str(workdir)]
        command += ["--steps-per-call", steps_per_call, "--log-steps", "2"]
        assert main(command) == 0
        curves[dtype] = read_metrics(workdir)
        arrays[dtype] = final_arrays(workdir)
        config = json.loads((workdir / "config.json").read_text())
        assert config["model"]["dtype"] == "float32"
    assert curves["float16"] == curves["float32"]
    assert types(arrays["float16"]) == {"float32"}
    assert_bitwise_equal(arrays["float16"], arrays["float32"])
