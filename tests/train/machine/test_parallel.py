"""One device, eight devices, pmap and shard_map: the same numbers."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GREY,
    abstract_state,
    compilations,
    make_config,
    relative,
    synthetic_set,
    train_steps,
)

import inertia_jax as ij
from inertia_jax.models.resnet_cifar import CifarResNet
from train.config import Model, Optimizer
from train.data.feed import Feed, choose_steps_per_call, even_calls
from train.fit.trainer import Trainer
from train.machine.parallel import Parallel

pytestmark = pytest.mark.usefixtures("optimised")


def make_resnet8(config, *, num_classes, image_shape):
    """Makes a residual network of seven convolutions, as `make_model` makes others."""
    del image_shape  # as in `make_model`, for networks of factories alone
    return CifarResNet(
        depth=8,
        num_classes=num_classes,
        width=config.width,
        plan=ij.Plan(),
        dtype=jnp.dtype(config.dtype),
    )


def train_resnet8(config, num_devices):
    """Returns what twenty steps on images of 8 x 8 give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.trainer.make_model", make_resnet8)
        return train_steps(config, synthetic_set(8), num_devices, 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_devices", "parallel", "memory_share", "steps_per_call"),
    [
        (8, "pmap", 0.5, 1),
        (8, "shard_map", 0.5, 1),
        (8, "shard_map", 1e-9, 2),  # streamed, several steps a call
        (1, "pmap", 0.5, 2),
    ],
)
def test_twenty_steps_in_float64_agree(
    x64, one_device, num_devices, parallel, memory_share, steps_per_call
):
    config = make_config(width=0.5, parallel=parallel, steps_per_call=steps_per_call)
    data = dataclasses.replace(config.data, memory_share=memory_share)
    config = dataclasses.replace(config, data=data)
    values = train_resnet8(config, num_devices)
    assert relative(values, one_device) < 1e-9


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        return train_resnet8(make_config(width=0.5), 1)


@pytest.mark.slow
def test_the_result_depends_on_the_seed(x64, one_device):
    values = train_resnet8(make_config(width=0.5, seed=2), 1)
    assert relative(values, one_device) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("resnet18", "pmap"),
        ("vgg16", "shard_map"),
        ("simpledla", "pmap"),
    ],
)
def test_one_step_in_float32_agrees(name, parallel, quick_compile):
    # The recipe's batch: of smaller ones, batch statistics amplify rounding more.
    data = synthetic_set(num_train=128)
    start, one = (
        train_steps(make_config("float32", name, 128), data, 1, n) for n in (0, 1)
    )
    eight = train_steps(
        make_config("float32", name, 128, parallel=parallel), data, 8, 1
    )
    assert relative(eight, one) < 1e-4
    # The step itself, which the parameters before it would hide. It is looser:
    # through batch statistics, float32 gradients differ by up to 0.1%.
    assert relative(eight - start, one - start) < 1e-2


@pytest.mark.slow
def test_dropout_and_adadelta_agree_over_devices(x64, quick_compile):
    config = dataclasses.replace(
        make_config(),
        data=GREY,
        model=Model(name="lenet", width=0.25, dtype="float64"),
        optimizer=Optimizer(name="adadelta", learning_rate=1.0, weight_decay=0.0),
    )
    data = synthetic_set(28, 1)
    assert (
        relative(train_steps(config, data, 8, 4), train_steps(config, data, 1, 4))
        < 1e-9
    )


@pytest.mark.slow
def test_unsynchronised_batch_norm_differs_over_devices(x64, one_device):
    config = make_config(width=0.5, sync_batch_norm=False)
    assert relative(train_resnet8(config, 8), one_device) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "simpledla"])
@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_every_step_lowers_for_tpu(name, parallel):
    dtype = "bfloat16" if parallel == "pmap" else "float32"
    config = make_config(dtype, name, parallel=parallel, steps_per_call=2)
    trainer = Trainer(config, synthetic_set())
    inputs = next(trainer.inputs(0, 0))
    exported = jax.export.export(jax.jit(trainer.train_call), platforms=["tpu"])(
        abstract_state(trainer), inputs
    )
    assert exported.platforms == ("tpu",)
    assert exported.nr_devices == 8
    assert "all_reduce" in exported.mlir_module()


@pytest.mark.slow
def test_bfloat16_trains_with_float32_parameters(quick_compile, monkeypatch):
    monkeypatch.setattr("train.fit.trainer.make_model", make_resnet8)
    config = make_config("bfloat16")
    trainer = Trainer(config, synthetic_set(16))
    state, totals = trainer.train_call(trainer.init_state(), next(trainer.inputs(0, 0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {
        jnp.dtype("float32")
    }
    assert np.isfinite(float(totals.loss))


@pytest.mark.parametrize(
    ("steps_per_epoch", "most", "expected"),
    [
        (390, 100, 78),
        (97, 100, 97),
        (781, 100, 71),
        (937, 100, 100),  # a prime: 37 are left
        (391, 100, 100),  # 17 x 23
        (390, 1, 1),
        (5, 100, 5),
    ],
)
def test_an_epoch_is_cut_into_calls_of_one_program(steps_per_epoch, most, expected):
    assert even_calls(steps_per_epoch, most) == expected


def test_calls_are_as_long_as_the_platform_takes_them():
    split = synthetic_set(num_train=4).train
    gpu = types.SimpleNamespace(platform="gpu")
    resident = jnp.asarray(split.images), jnp.asarray(split.labels)
    there = Feed(split, Parallel("pmap", (gpu, gpu)), resident)
    here = dataclasses.replace(there, parallel=Parallel("pmap", tuple(jax.devices())))
    streamed = dataclasses.replace(there, resident=None)
    choose = functools.partial(choose_steps_per_call, steps_per_epoch=390)
    assert choose(there, asked=None, batch_size=128) == 78
    assert choose(there, asked=50, batch_size=128) == 50
    assert choose(here, asked=None, batch_size=128) == 1
    # 512 MiB for two devices hold ten steps of 16,000 images of 3 KiB.
    assert choose(streamed, asked=None, batch_size=16_000) == 10
    assert choose(streamed, asked=11, batch_size=16_000) == 10


@pytest.mark.slow
def test_the_step_compiles_once(quick_compile, monkeypatch):
    monkeypatch.setattr("train.fit.trainer.make_model", make_resnet8)
    trainer = Trainer(make_config("float32"), synthetic_set(16))
    state = trainer.init_state()
    with compilations() as compiled:
        counts = []
        for inputs in trainer.inputs(0, 0):
            state, totals = trainer.train_call(state, inputs)
            jax.block_until_ready(totals)
            counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1] == counts[0]
