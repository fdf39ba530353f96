"""One device, eight devices, pmap and shard_map: the same numbers."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import Config, Data, Model, Optimizer
from train.data.sets import ImageSet, Split
from train.feed import Feed, choose_steps_per_call, even_calls
from train.parallel import Parallel
from train.state import init_state
from train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("optimised")

SYNTHETIC = Data(source="synthetic", mean=(0.5,) * 3, std=(0.25,) * 3)


def synthetic_set(size=32, channels=3, num_train=64, num_test=19):
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(256, size=(n, size, size, channels), dtype=np.uint8)
        return Split(images, rng.integers(10, size=n).astype(np.int32))

    names = tuple(map(str, range(10)))
    return ImageSet("synthetic", split(num_train), split(num_test), names)


def make_config(
    dtype="float64", name="resnet18", batch_size=32, width=0.125, **options
):
    return Config(
        batch_size=batch_size,
        epochs=10,
        data=SYNTHETIC,
        model=Model(name=name, width=width, dtype=dtype),
        optimizer=Optimizer(learning_rate=0.05, label_smoothing=0.1),
        **options,
    )


def train(config, data, num_devices, steps):
    """Returns flat parameters and statistics after `steps`."""
    trainer = Trainer(config, data, jax.devices()[:num_devices])
    state, step, epoch = trainer.init_state(), 0, 0
    while step < steps:
        for inputs in trainer.inputs(epoch, 0):
            state, _ = trainer.train_call(state, inputs)
            step += inputs[2].shape[1]
        epoch += 1
    assert step == steps
    values, _ = jax.flatten_util.ravel_pytree(jax.device_get(state.variables))
    return np.asarray(values)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# On images of 16 x 16: at 32 x 32 the steps take longer than compiling them.
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
    config = make_config(parallel=parallel, steps_per_call=steps_per_call)
    data = dataclasses.replace(config.data, memory_share=memory_share)
    config = dataclasses.replace(config, data=data)
    values = train(config, synthetic_set(16), num_devices, 20)
    assert relative(values, one_device) < 1e-9


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        return train(make_config(), synthetic_set(16), 1, 20)


def test_the_result_depends_on_the_seed(x64, one_device):
    values = train(make_config(seed=2), synthetic_set(16), 1, 20)
    assert relative(values, one_device) > 0.1


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
    start, one = (train(make_config("float32", name, 128), data, 1, n) for n in (0, 1))
    eight = train(make_config("float32", name, 128, parallel=parallel), data, 8, 1)
    assert relative(eight, one) < 1e-4
    # The step itself, which the parameters before it would hide. It is looser:
    # through batch statistics, float32 gradients differ by up to 0.1%.
    assert relative(eight - start, one - start) < 1e-2


def test_dropout_and_adadelta_agree_over_devices(x64, quick_compile):
    config = dataclasses.replace(
        make_config(),
        data=dataclasses.replace(SYNTHETIC, mean=(0.5,), std=(0.25,)),
        model=Model(name="lenet", width=0.25, dtype="float64"),
        optimizer=Optimizer(name="adadelta", learning_rate=1.0, weight_decay=0.0),
    )
    data = synthetic_set(28, 1)
    assert relative(train(config, data, 8, 4), train(config, data, 1, 4)) < 1e-9


def test_unsynchronised_batch_norm_differs_over_devices(x64, one_device):
    config = make_config(sync_batch_norm=False)
    assert relative(train(config, synthetic_set(16), 8, 20), one_device) > 1e-6


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "simpledla"])
@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_every_step_lowers_for_tpu(name, parallel):
    dtype = "bfloat16" if parallel == "pmap" else "float32"
    config = make_config(dtype, name, parallel=parallel, steps_per_call=2)
    trainer = Trainer(config, synthetic_set())
    state = jax.eval_shape(
        lambda: init_state(
            trainer.model, trainer.update, (32, 32, 3), jax.random.key(0)
        )
    )
    args = (state, *next(trainer.inputs(0, 0)), trainer._positions)
    exported = jax.export.export(jax.jit(trainer._call), platforms=["tpu"])(*args)
    assert exported.platforms == ("tpu",)
    assert exported.nr_devices == 8
    assert "all_reduce" in exported.mlir_module()


def test_bfloat16_trains_with_float32_parameters(quick_compile):
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


def test_the_step_compiles_once(quick_compile):
    trainer = Trainer(make_config("float32"), synthetic_set(16))
    state = trainer.init_state()
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        counts = []
        for inputs in trainer.inputs(0, 0):
            state, totals = trainer.train_call(state, inputs)
            jax.block_until_ready(totals)
            counts.append(len(compiled))
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] > 0
    assert counts[1] == counts[0]
