"""The training step with gates: what moves thresholds, on one and eight devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import GREY, make_config, relative, synthetic_set, take_steps, train_steps

import inertia_jax as ij
from inertia_jax.models.layers import Layers
from train.config import Model, Optimizer

IMAGES = np.random.default_rng(0).integers(256, size=(32, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(32, dtype=np.int32) % 10
INPUTS = (IMAGES / 255).astype(np.float32)


class Gated(nn.Module):
    """One convolution by plan."""

    plan: ij.Plan

    @nn.compact
    def __call__(self, x, *, train=False):
        make = Layers(self.plan, jnp.float32, None, train)
        x = make.conv(self, "gated", jnp.asarray(x), 8, 3, padding=1)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


take_gated_steps = partial(take_steps, images=IMAGES, labels=LABELS)


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


@pytest.mark.slow
@pytest.mark.parametrize("first", [0.5, 1.4], ids=["open", "closed"])
def test_a_threshold_moves_to_meet_the_budget(first):
    optimizer = Optimizer(learning_rate=0.05, momentum=0.0, milestones=(1000,))
    rate = lambda state: state.totals.gate_rate / state.totals.count  # noqa: E731
    train = partial(take_gated_steps, gated(first), optimizer=optimizer)
    _, state = train(steps=1)
    assert (rate(state) > 0.8) if first < 1 else (rate(state) < 0.1)
    _, state = train(steps=60, gate_budget=0.4, gate_penalty=3.0)
    assert abs(rate(state) - 0.4) < 0.05
    assert state.params["gated"]["threshold"] != first


@pytest.mark.slow
@pytest.mark.parametrize("gate_budget", [None, 0.2])
def test_the_threshold_follows_loss_and_budget_alone(gate_budget):
    model = gated(1.0)
    optimizer = Optimizer(learning_rate=0.5, momentum=0.0, weight_decay=0.1)
    first, state = take_gated_steps(
        model, 1, optimizer=optimizer, gate_budget=gate_budget, gate_penalty=2.0
    )
    start, totals = first.variables, state.totals

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


@pytest.mark.slow
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
    config = dataclasses.replace(
        make_config(gate_budget=gate_budget),
        data=GREY,
        model=Model("lenet", width=0.25, dtype="float64", plan=plan.to_json()),
    )
    images = synthetic_set(12, 1)
    one, eight = (train_steps(config, images, n, 4) for n in (1, 8))
    assert relative(eight, one) < 1e-9
