"""Every kind of layer of Flax: factorised with the same outputs, or left and why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij

KEY = jax.random.key(0)
SHAPES = {1: (12, 4), 2: (8, 6, 4), 3: (4, 5, 6, 4)}
# Full rank loses the rounding of float32 alone.
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


def images(num_axes, number=3):
    shape = (number, *SHAPES[num_axes])
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class Net(nn.Module):
    """A layer that `make` makes, between two others of one tap."""

    make: object
    num_axes: int

    @nn.compact
    def __call__(self, x):
        one = functools.partial(nn.Conv, 4, (1,) * self.num_axes)
        return one(name="last")(jnp.tanh(self.make()(one(name="first")(x))))


def conv(size, **options):
    return lambda: nn.Conv(6, size, name="layer", **options)


KINDS = {
    "1-D": (1, conv((3,))),
    "one number": (1, conv(3, strides=2)),
    "causal": (1, conv((3,), padding="CAUSAL", kernel_dilation=2)),
    "1-D circular": (1, conv((4,), padding="CIRCULAR")),
    "1-D reflect": (1, conv((5,), padding="REFLECT", strides=2)),
    "1-D valid": (1, conv((3,), padding="VALID", use_bias=False)),
    "1-D groups": (1, conv((3,), feature_group_count=2)),
    "1-D pads": (1, conv((3,), padding=[(2, 0)])),
    "one tap": (1, conv((1,), strides=2, padding=1)),
    "2-D strides": (2, conv((3, 3), strides=(2, 1))),
    "2-D dilations": (2, conv((3, 2), kernel_dilation=(1, 2))),
    "2-D circular": (2, conv((3, 4), padding="CIRCULAR", kernel_dilation=2)),
    "2-D reflect": (2, conv((3, 3), padding="REFLECT", strides=2)),
    "2-D same lower": (2, conv((2, 2), padding="SAME_LOWER", strides=2)),
    "2-D groups": (2, conv((3, 3), feature_group_count=2, padding=((1, 2), 0))),
    "3-D": (3, conv((3, 3, 3))),
    "3-D strides": (3, conv((2, 3, 1), strides=(1, 2, 2), padding="VALID")),
    "3-D dilations": (3, conv((2, 2, 2), kernel_dilation=(1, 2, 1), padding=1)),
    "3-D circular": (3, conv((3, 1, 2), padding="CIRCULAR", feature_group_count=2)),
    "3-D one tap": (3, conv((1, 1, 1), feature_group_count=2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_convolution_is_factorised(kind):
    num_axes, make = KINDS[kind]
    model, x = Net(make, num_axes), images(num_axes)
    shape = x.shape[1:]
    variables = model.init(KEY, x)
    expected = model.apply(variables, x)
    rules = {"layer": ij.Ratio(1.0), "[fl]*st": ij.Energy(1.0)}
    small, factors = model, variables
    for layers, ranks in rules.items():
        small, factors = ij.compress(
            small,
            factors,
            ranks=ranks,
            layers=layers,
            calibration=x,
            only_cheaper=False,
            image_shape=shape,
        )
    assert len(small.plan.rules) == 3 and not small.kept
    close(small.apply(factors, x), expected)
    assert jax.tree.map(jnp.shape, small.init(KEY, x)) == jax.tree.map(
        jnp.shape, factors
    )
    back, dense = ij.decompress(small, factors, image_shape=shape)
    jax.tree.map(close, dense, dict(variables))
    close(back.apply(dense, x), expected)
    # What the layer costs is what it computes: positions times taps.
    kernel = variables["params"]["layer"]["kernel"]
    row = ij.count_cost(model, shape).rows[1]
    out = jax.eval_shape(model.apply, variables, x).shape[1:-1]
    assert row.macs == np.prod(out) * kernel.size
