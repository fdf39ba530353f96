"""What a network puts out on calibration images, and how far that is from another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.compression.calibration import (
    apply_as_trained,
    divergence,
    divergence_of,
)
from inertia_jax.inputs import batched

IMAGES = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype(np.float32)


class Dropping(nn.Module):
    """A convolution, perhaps inertial, perhaps normalised, before dropout."""

    inertial: bool = False
    norm: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        if self.inertial:
            x = ij.InertialConv(3, 1, 3, relative=True)(x, train=train)
        if self.norm:
            x = nn.BatchNorm(not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x.mean((1, 2))


def test_divergence_by_hand():
    p, q = np.array([[0.5, 0.5], [0.2, 0.8]]), np.array([[0.25, 0.75], [0.2, 0.8]])
    found = divergence(jnp.log(p) + 3, jnp.log(q) - 2)  # a softmax knows no offset
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_divergence_is_computed_in_float32():
    logits = jnp.asarray([[1.0, 2.0]], jnp.bfloat16)
    found = divergence(jnp.asarray([[1.0, 2.25]], jnp.float32), logits)
    assert found.dtype == jnp.float32
    # log(1 + e^-1.25) of the reference and log(1 + e^-1) of the other.
    p = 1 / (1 + np.exp(-1.25))
    expected = 0.25 * p + np.log1p(np.exp(1.0)) - np.log1p(np.exp(1.25))
    np.testing.assert_allclose(found, [expected], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "is_training"),
    [
        (Dropping(), False),
        (Dropping(inertial=True), False),
        (Dropping(norm=True), True),
    ],
)
def test_only_batch_norm_turns_train_mode_on(model, is_training):
    variables = model.init(jax.random.key(0), IMAGES)
    x = jnp.asarray(IMAGES)
    still = model.apply(variables, x)
    outputs, _ = apply_as_trained(model, variables, x)
    assert np.allclose(outputs, still) != is_training
    # Dropout draws the same units every time.
    again, _ = apply_as_trained(model, variables, x)
    np.testing.assert_array_equal(outputs, again)
    _, changed = apply_as_trained(model, variables, x, train=True)
    assert (
        changed.get("batch_stats", {}).keys() == variables.get("batch_stats", {}).keys()
    )


def test_a_network_without_train_is_called_without():
    model = nn.Sequential([nn.Conv(2, (1, 1)), lambda x: x.mean((1, 2))])
    variables = model.init(jax.random.key(0), IMAGES)
    outputs, changed = apply_as_trained(model, variables, jnp.asarray(IMAGES))
    np.testing.assert_array_equal(outputs, model.apply(variables, IMAGES))
    assert changed == {}


def test_a_network_does_not_diverge_from_itself():
    model = nn.Sequential([nn.Conv(3, (3, 3)), lambda x: x.mean((1, 2))])
    variables = model.init(jax.random.key(0), IMAGES)
    measure = divergence_of(model, variables, batched(IMAGES, 2))
    assert measure(variables) == 0
    other = jax.tree.map(lambda leaf: 5 * leaf, variables)
    logits = [model.apply(v, IMAGES) for v in (variables, other)]
    logs = [np.asarray(jax.nn.log_softmax(x), np.float64) for x in logits]
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    np.testing.assert_allclose(measure(other), expected, rtol=1e-3)


def test_batches_are_whole():
    assert [len(batch) for batch in batched(IMAGES, 4)] == [4]
    assert [len(batch) for batch in batched(IMAGES, 3)] == [3, 3]
    assert [len(batch) for batch in batched(IMAGES, 100)] == [6]
