"""Trained and frozen parameters: which they are, and that the latter stay."""

import jax
import numpy as np
import pytest
from helpers import GREY, Small, flat, synthetic_set, take_steps

from train.config import Config, Model, Optimizer
from train.errors import UsageError
from train.fit.trainer import Trainer
from train.step.trainable import (
    describe_trained,
    join_params,
    split_params,
    trained_paths,
)

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
        data=GREY,
        model=Model("lenet", width=0.06),
        optimizer=Optimizer(milestones=(1,)),
        **options,
    )
    images = synthetic_set(8, 1, num_train=16)
    trainer = Trainer(config, images, jax.devices()[:1])
    return trainer, trainer.init_state()


def lowered(**options):
    trainer, state = lenet(**options)
    return trainer.lower(state).as_text()


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
