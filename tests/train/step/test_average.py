"""Averages of the variables: their values, on any devices, saved and resumed."""

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
    flat,
    make_config,
    read_metrics,
    relative,
    save_bright_digits,
    stop_at,
    synthetic_set,
    take_steps,
)

import inertia_jax as ij
from train.__main__ import main
from train.config import Data, Model, Optimizer
from train.fit.trainer import Trainer
from train.step.state import moving_average


def test_averages_are_numpys(x64):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 3))
    ours, expected = {"kernel": jnp.zeros(3)}, np.zeros(3)
    update = jax.jit(moving_average, static_argnames="decay")
    for step, value in enumerate(values):
        ours = update(ours, {"kernel": value}, decay=0.7, step=jnp.int32(step))
        share = min(0.7, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * value
        np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-12)
    assert share == 0.7


def test_what_does_not_move_keeps_every_bit_and_its_type():
    values = np.array([0.1, 1 / 3, 1e9, np.inf], np.float32)
    values = {"a": values, "b": values.astype(jnp.bfloat16)}
    ours = moving_average(values, values, decay=0.9, step=jnp.int32(5))
    assert_bitwise_equal(jax.device_get(ours), values)


def test_the_step_averages_parameters_and_statistics():
    trained = frozenset({"fc/kernel", "bn/scale"})
    options = {"trained": trained, "ema_decay": 0.15}
    first, one = take_steps(Small(), 1, **options)
    _, two = take_steps(Small(), 2, **options)
    expected = flat(first.averages)
    # 0.1 of the first step's, 2/11 of the second's but for the limit.
    for share, state in ((0.1, one), (0.15, two)):
        for path, value in flat(state.variables).items():
            expected[path] = share * expected[path] + (1 - share) * value
            found = flat(state.averages)[path]
            np.testing.assert_allclose(found, expected[path], rtol=1e-5, atol=1e-7)
    before, after = flat(first.averages), flat(two.averages)
    moved = {path for path in before if np.any(before[path] != after[path])}
    statistics = {"batch_stats/bn/mean", "batch_stats/bn/var"}
    assert moved == {"params/fc/kernel", "params/bn/scale", *statistics}
    assert two.result is two.averages


GATED = ij.Inertial(1, 3, threshold=ij.Learned(1.0), relative=True)


def fast(memory_share=0.5, **options):
    """All that the fast recipe turns on, for a small network with statistics."""
    return dataclasses.replace(
        make_config(batch_size=16, **options),
        data=Data(
            source="synthetic",
            mean=(0.5,),
            std=(0.25,),
            crop_mode="reflect",
            flip_mode="alternating",
            memory_share=memory_share,
        ),
        model=Model(
            "lenet",
            width=0.06,
            dtype="float64",
            plan=ij.Plan((("conv2", GATED),)).to_json(),
        ),
        optimizer=Optimizer(
            learning_rate=0.02,
            base_batch_size=8,
            nesterov=True,
            schedule="one_cycle",
            peak_share=0.1,
            label_smoothing=0.2,
            decay_norm_and_bias=False,
            ema_decay=0.5,
        ),
    )


def four_steps(num_devices, **options):
    """Returns flat averages and variables after two epochs of two steps."""
    images = synthetic_set(8, 1, num_train=32)
    trainer = Trainer(fast(**options), images, jax.devices()[:num_devices])
    state = trainer.init_state()
    for epoch in range(2):
        for inputs in trainer.inputs(epoch, 0):
            state, _ = trainer.train_call(state, inputs)
    trees = jax.device_get((state.averages, state.variables))
    return [np.asarray(jax.flatten_util.ravel_pytree(tree)[0]) for tree in trees]


@pytest.mark.slow
def test_eight_devices_that_stream_agree_with_one(x64):
    one = four_steps(1)
    assert relative(*one) > 1e-3
    for ours, expected in zip(four_steps(8, memory_share=1e-9), one, strict=True):
        assert relative(ours, expected) < 1e-9


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """The command of a run with averages and a flip test."""
    path = tmp_path_factory.mktemp("data") / "set.npz"
    source = save_bright_digits(path, 48, 37, 8, noise=60, step=18)
    return [
        *("fit", "--data.source", source, "--batch-size", "8", "--epochs", "3"),
        *("--data.mean", "0.5", "--data.std", "0.25", "--data.crop-padding", "1"),
        *("--data.crop-mode", "reflect", "--data.flip-mode", "alternating"),
        *("--model.name", "lenet", "--model.width", "0.1", "--steps-per-call", "2"),
        *("--optimizer.schedule", "one_cycle", "--optimizer.ema-decay", "0.8"),
        "--flip-test",
    ]


@pytest.fixture(scope="module")
def run(fit, one_device, tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*fit, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(fit, run, tmp_path, monkeypatch):
    command = [*fit, "--workdir", str(tmp_path / "run"), "--resume"]
    stop_at(5, monkeypatch)  # in the second epoch of three
    assert main(command) == 0
    assert int(final_arrays(tmp_path / "run")["training"]["step"]) == 10
    monkeypatch.undo()
    assert main(command) == 0
    assert_bitwise_equal(final_arrays(tmp_path / "run"), final_arrays(run))


@pytest.mark.slow
def test_averages_are_saved_and_evaluated(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step_00000018"
    _, variables = ij.load_checkpoint(checkpoint)
    saved = final_arrays(run)["training"]["variables"]
    differing = jax.tree.map(lambda a, b: np.any(a != b), variables, saved)
    assert all(jax.tree.leaves(differing))
    last = read_metrics(run)[-1]
    found = {}
    for options in ([], ["--flip-test"]):
        out = tmp_path / "evaluation.json"
        assert main(["evaluate", str(checkpoint), *options, "--out", str(out)]) == 0
        found[bool(options)] = json.loads(out.read_text())
    assert [found[flips]["flip_test"] for flips in (False, True)] == [False, True]
    np.testing.assert_allclose(found[True]["loss"], last["loss"], rtol=1e-6)
    assert abs(found[False]["loss"] / last["loss"] - 1) > 1e-5
    assert "37, images and mirror images)" in capsys.readouterr().out


def test_finetuning_starts_from_the_averages(run, tmp_path, one_device):
    checkpoint = run / "checkpoints" / "step_00000018"
    options = ["--epochs", "1", "--batch-size", "8", "--train-only", "fc2"]
    options += ["--optimizer.ema-decay", "0.8", "--workdir", str(tmp_path / "run")]
    assert main(["finetune", str(checkpoint), *options]) == 0
    before = flat(ij.load_checkpoint(checkpoint)[1])
    after = flat(final_arrays(tmp_path / "run")["variables"])
    moved = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert moved == {"params/fc2/kernel", "params/fc2/bias"}


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on(fit, tmp_path, monkeypatch, one_device):
    plain = fit[: fit.index("--data.crop-mode")]
    plain += ["--model.name", "lenet", "--model.width", "0.1"]
    command = [*plain, "--workdir", str(tmp_path / "run"), "--resume"]
    stop_at(2, monkeypatch)
    assert main(command) == 0
    monkeypatch.undo()
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    for part, name in (
        *(("data", name) for name in ("crop_mode", "flip_mode")),
        *(("optimizer", name) for name in ("ema_decay", "peak_share")),
        *(("optimizer", name) for name in ("base_batch_size", "decay_norm_and_bias")),
    ):
        del config[part][name]
    del config["flip_test"]
    file.write_text(json.dumps(config))
    assert main([*command, "--optimizer.ema-decay", "0.5"]) == 2
    assert main(command) == 0
    assert final_arrays(tmp_path / "run")["training"].keys() == {
        "step",
        "opt_state",
        "totals",
    }
