"""The training step with gates: what moves thresholds, on one and eight devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_parallel
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.layers import Layers
from inertia_jax.metadata import Preprocessing
from train.augment import Augmentation
from train.config import Model, Optimizer
from train.optimizer import make_optimizer
from train.parallel import Parallel
from train.state import Update, init_state
from train.step import Objective, TrainStep

IMAGES = np.random.default_rng(0).integers(256, size=(32, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(32, dtype=np.int32) % 10
INPUTS = (IMAGES / 255).astype(np.float32)


class Gated(nn.Module):
    """One convolution by plan."""

    plan: ij.Plan

    @nn.compact
    def __call__(self, x, *, train=False):
        make = Layers(self.plan, jnp.float32, None)
        x = make.conv(self, "gated", jnp.asarray(x), 8, 3, padding=1, train=train)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


def gated(first):
    spec = ij.Inertial(
        1,
        3,
        threshold=ij.Learned(first),
        gate_gradient="ste",
        slope=5.0,
        relative=True,
    )
    return Gated(ij.Plan((("gated", spec),)))


def train_gated(model, steps, optimizer, **gates):
    """Returns first variables, last state and totals of steps of the whole batch."""
    preprocessing = Preprocessing((8, 8, 3), (0.0,) * 3, (1.0,) * 3)
    augmentation = Augmentation.plain(preprocessing, "float32")
    tx = make_optimizer(optimizer, steps_per_epoch=1, epochs=1)
    update = Update(tx)
    step = TrainStep(
        model, update, augmentation, Objective(**gates), steps_per_epoch=1, seed=1
    )
    call = Parallel("pmap", (jax.devices()[0],)).wrap(step.call, (False, *[True] * 4))
    state = init_state(model, update, (8, 8, 3), jax.random.key(0))
    start, places = state.variables, np.arange(32, dtype=np.int32)
    for _ in range(steps):
        state, totals = call(
            state, IMAGES[None], LABELS[None], places[None, None], places[None]
        )
    return start, state, totals


@pytest.mark.parametrize("first", [0.5, 1.4], ids=["open", "closed"])
def test_a_threshold_moves_to_meet_the_budget(first):
    optimizer = Optimizer(learning_rate=0.05, momentum=0.0, milestones=(1000,))
    rate = lambda totals: float(totals.gate_rate / totals.count)  # noqa: E731
    train = partial(train_gated, gated(first), optimizer=optimizer)
    _, _, totals = train(steps=1)
    assert (rate(totals) > 0.8) if first < 1 else (rate(totals) < 0.1)
    _, state, totals = train(steps=60, gate_budget=0.4, gate_penalty=3.0)
    assert abs(rate(totals) - 0.4) < 0.05
    assert state.params["gated"]["threshold"] != first


@pytest.mark.parametrize("gate_budget", [None, 0.2])
def test_the_threshold_follows_loss_and_budget_alone(gate_budget):
    model = gated(1.0)
    optimizer = Optimizer(learning_rate=0.5, momentum=0.0, weight_decay=0.1)
    start, state, totals = train_gated(
        model, 1, optimizer, gate_budget=gate_budget, gate_penalty=2.0
    )

    def outputs(params):
        logits, moved = model.apply(
            {**start, "params": params},
            INPUTS,
            train=True,
            mutable=["batch_stats", "intermediates"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
        return loss, moved["intermediates"]["gated"]["gate_rate"][0].mean()

    params = start["params"]
    (loss, rate), pull = outputs(params), jax.jacrev(outputs)(params)
    factor = 0.0 if gate_budget is None else 2 * 2.0 * (rate - gate_budget)
    assert abs(pull[0]["gated"]["threshold"]) > 1e-4
    for name, decay in (("threshold", 0.0), ("kernel", 0.1)):
        value, of_loss, of_rate = (p["gated"][name] for p in (params, *pull))
        expected = value - 0.5 * (of_loss + factor * of_rate + decay * value)
        actual = state.params["gated"][name]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    # The loss that is reported is without the budget.
    np.testing.assert_allclose(totals.loss / totals.count, loss, rtol=1e-5)
    np.testing.assert_allclose(totals.gate_rate / totals.count, rate, rtol=1e-5)


# Not l1, whose gradient jumps where two pixels are equal but for rounding.
STE = {"gate_gradient": "ste", "relative": True, "metric": "l2"}


@pytest.mark.parametrize(
    ("options", "gate_budget"),
    [
        ({"threshold": ij.Rate(0.4)}, None),
        ({"threshold": ij.Learned(1.0), **STE}, 0.3),
    ],
    ids=["rate", "learned"],
)
def test_one_and_eight_devices_take_the_same_steps(options, gate_budget, x64):
    window = ij.Inertial(1, 3, **options)
    tiled = ij.Inertial(3, 4, reading="tiled", **options)
    plan = ij.Plan((("conv1", window), ("conv2", tiled)))
    data = dataclasses.replace(test_parallel.SYNTHETIC, mean=(0.5,), std=(0.25,))
    config = dataclasses.replace(
        test_parallel.make_config(gate_budget=gate_budget),
        data=data,
        model=Model("lenet", width=0.25, dtype="float64", plan=plan.to_json()),
    )
    images = test_parallel.synthetic_set(12, 1)
    one, eight = (test_parallel.train(config, images, n, 4) for n in (1, 8))
    assert test_parallel.relative(eight, one) < 1e-9
