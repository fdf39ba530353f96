"""Inputs of every kind: integers, several by name, and numbers."""

import jax
import numpy as np
from flax import linen as nn

import inertia_jax as ij

KEY = jax.random.key(0)


class Tokens(nn.Module):
    """A network of sequences of integers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 8)(tokens)
        x = nn.relu(nn.Conv(16, (3,), name="one")(x))
        return nn.Conv(16, (3,), name="two")(x).mean(1)


def test_integers_stay_integers():
    tokens = np.random.default_rng(0).integers(0, 50, (8, 12))
    model = Tokens()
    variables = model.init(KEY, tokens)
    small, factors = ij.compress(
        model, variables, ranks=ij.Ratio(0.5), calibration=tokens
    )
    assert [path for path, _ in small.plan.rules] == ["one", "two"]
    fitted = ij.reconstruct(
        small, factors, dense=(model, variables), images=tokens, iterations=1
    )
    assert np.isfinite(small.apply(fitted, tokens)).all()


def test_images_of_integers_are_images(no_shape_checks):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    model = ij.create_model("lenet", width=0.2)
    variables = ij.init_variables(model, KEY)
    small, factors = ij.compress(
        model, variables, ranks=ij.Ratio(0.5), calibration=pixels
    )
    assert small.plan.rules
    assert np.isfinite(small.apply(factors, pixels)).all()
