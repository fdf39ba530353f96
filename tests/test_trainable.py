"""Trained and frozen parameters: which they are, and that the latter stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parallel
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from inertia_jax.layers import Layers
from inertia_jax.metadata import Preprocessing
from train.augment import Augmentation
from train.config import Config, Model, Optimizer
from train.errors import UsageError
from train.optimizer import make_optimizer
from train.parallel import Parallel
from train.state import Update, init_state
from train.step import Objective, TrainStep
from train.trainable import describe_trained, join_params, split_params, trained_paths
from train.trainer import Trainer

IMAGES = np.random.default_rng(0).integers(256, size=(16, 6, 6, 2), dtype=np.uint8)
LABELS = np.arange(16, dtype=np.int32) % 10
INPUTS = (IMAGES / 255).astype(np.float32)
DECAYING = Optimizer(learning_rate=0.1, weight_decay=0.1, milestones=(1000,))


class Small(nn.Module):
    """An inertial convolution with a threshold, BatchNorm, a linear layer."""

    features: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, *, train=False):
        spec = ij.Inertial(1, 3, threshold=ij.Learned(0.5))
        dtype = jnp.dtype(self.dtype)
        make = Layers(ij.Plan((("conv", spec),)), dtype, None)
        x = make.conv(
            self, "conv", jnp.asarray(x), self.features, 3, padding=1, train=train
        )
        x = nn.relu(
            nn.BatchNorm(use_running_average=not train, dtype=dtype, name="bn")(x)
        )
        x = x.mean((1, 2))
        return nn.Dense(10, dtype=dtype, name="fc")(x)


def take_steps(
    model,
    steps,
    *,
    optimizer=DECAYING,
    trained=None,
    ema_decay=0.0,
    teacher=None,
    **objective,
):
    """Returns first and last state after steps of the whole batch."""
    shape = INPUTS.shape[1:]
    preprocessing = Preprocessing(shape, (0.0,) * 2, (1.0,) * 2)
    augmentation = Augmentation.plain(preprocessing, model.dtype)
    tx = make_optimizer(optimizer, steps_per_epoch=1, epochs=1)
    update = Update(tx, trained, ema_decay)
    step = TrainStep(
        model, update, augmentation, Objective(**objective), steps_per_epoch=1, seed=1
    )
    spread = (False, *[True] * 4, False)
    call = Parallel("pmap", (jax.devices()[0],)).wrap(step.call, spread)
    first = last = init_state(model, update, shape, jax.random.key(0))
    places = np.arange(16, dtype=np.int32)
    for _ in range(steps):
        last, _ = call(
            last, IMAGES[None], LABELS[None], places[None, None], places[None], teacher
        )
    return first, last


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


NESTED = {
    "conv1": {"kernel": 0},
    "layer1_0": {"conv1": {"kernel": 0}, "bn1": {"bias": 0, "scale": 0}},
    "layer1_1": {"conv1": {"kernel": 0, "threshold": 0}},
    "fc": {"bias": 0, "kernel": 0},
}


@pytest.mark.parametrize(
    ("train_only", "freeze", "expected"),
    [
        (["fc"], [], "fc/bias fc/kernel"),
        (["conv1"], [], "conv1/kernel"),
        (["layer1_0"], ["*/bias"], "layer1_0/conv1/kernel layer1_0/bn1/scale"),
        (["layer1_?/conv1"], ["*_0"], "layer1_1/conv1/kernel layer1_1/conv1/threshold"),
        (["*/kernel", "fc"], ["layer1*", "conv1"], "fc/bias fc/kernel"),
        ([], ["layer1_*", "fc/bias"], "conv1/kernel fc/kernel"),
    ],
)
def test_globs_take_parameters_and_layers(train_only, freeze, expected):
    found = trained_paths(NESTED, train_only=train_only, freeze=freeze)
    assert found == frozenset(expected.split())
    moving, fixed = split_params(NESTED, found)
    assert flat(moving).keys() == found
    assert not flat(fixed).keys() & found
    assert join_params(moving, fixed) == NESTED


@pytest.mark.parametrize(
    ("train_only", "freeze", "message"),
    [
        (["fc", "FC"], [], r"^`train_only` \(='FC'\) must match .*, such as conv1/ke"),
        (["fc"], ["bn1"], r"^`freeze` \(='bn1'\) must match a parameter or a layer"),
        (
            ["fc"],
            ["f*"],
            r"\('fc',\)\) and `freeze` \(=\('f\*',\)\) .* none is left",
        ),
    ],
)
def test_globs_that_take_nothing_or_all_are_refused(train_only, freeze, message):
    with pytest.raises(UsageError, match=message):
        trained_paths(NESTED, train_only=train_only, freeze=freeze)


def test_frozen_parameters_keep_every_bit_and_statistics_move():
    # The threshold has no gradient here, and decay passes it by.
    trained = frozenset({"fc/kernel", "conv/threshold"})
    first, last = take_steps(Small(), 2, trained=trained)
    before, after = flat(first.params), flat(last.params)
    assert before.keys() == after.keys() > trained
    for path in before.keys() - {"fc/kernel"}:
        assert before[path].tobytes() == after[path].tobytes(), path
    assert np.all(before["fc/kernel"] != after["fc/kernel"])
    for old, new in zip(*map(jax.tree.leaves, (first, last)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    for path, old in flat(first.collections["batch_stats"]).items():
        assert np.all(old != flat(last.collections["batch_stats"])[path]), path


def test_the_optimiser_keeps_momentum_of_what_is_trained_alone():
    first, _ = take_steps(Small(), 0, trained=frozenset({"fc/bias"}))
    arrays = [leaf for leaf in jax.tree.leaves(first.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in arrays] == [(10,)]
    words = describe_trained(first.params, frozenset({"fc/bias"}))
    assert words == "training 10 of 67 parameters"


def test_what_is_trained_takes_the_step_of_a_whole_network():
    _, whole = take_steps(Small(), 1)
    _, part = take_steps(Small(), 1, trained=frozenset({"fc/kernel", "bn/scale"}))
    for path in ("fc/kernel", "bn/scale"):
        expected, found = flat(whole.params)[path], flat(part.params)[path]
        # The same gradients, but XLA may sum them in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.any(flat(whole.params)["conv/kernel"] != flat(part.params)["conv/kernel"])


def lenet(**options):
    """A trainer and its first state, on one device."""
    config = Config(
        batch_size=8,
        epochs=2,
        data=dataclasses.replace(test_parallel.SYNTHETIC, mean=(0.5,), std=(0.25,)),
        model=Model("lenet", width=0.06),
        optimizer=Optimizer(milestones=(1,)),
        **options,
    )
    images = test_parallel.synthetic_set(8, 1, num_train=16)
    trainer = Trainer(config, images, jax.devices()[:1])
    return trainer, trainer.init_state()


def lowered(**options):
    trainer, state = lenet(**options)
    inputs = (state, *next(trainer.inputs(0, 0)), trainer._positions)
    return trainer._call.lower(*inputs).as_text()


@pytest.mark.parametrize(
    ("options", "convolutions", "products"),
    [
        # Convolutions: two forwards and the gradient of the second's images. Products:
        # two forwards and two gradients of each of two linear layers; on CPU three rows
        # of taps for each convolution's kernel.
        ({}, 3, 6 + 2 * 3),
        ({"freeze": ("conv1",)}, 2, 6 + 3),
        ({"train_only": ("fc2",)}, 2, 2 + 1),
    ],
)
def test_no_gradient_is_computed_of_what_is_frozen(options, convolutions, products):
    text = lowered(**options)
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("stablehlo.dot_general") == products


def test_training_everything_by_glob_is_the_same_program():
    assert lowered(train_only=("*",)) == lowered()
    _, state = lenet()
    trainer, by_glob = lenet(train_only=("*",))
    assert jax.tree.structure(by_glob) == jax.tree.structure(state)
    expected = trainer.update.tx.init(state.params)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(expected)


def test_a_trainer_refuses_globs_before_it_trains():
    with pytest.raises(UsageError, match=r"`freeze` \(='layer1\*'\)"):
        lenet(freeze=("layer1*",))
