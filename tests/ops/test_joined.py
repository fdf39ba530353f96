"""A core and its last factor, which a TPU trains as one convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import inertia_jax as ij
from inertia_jax.ops.tucker.joined import joining_pays

pytestmark = pytest.mark.usefixtures("optimised")

IMAGES = jax.random.normal(jax.random.key(0), (2, 9, 8, 6))
LAYERS = {
    "plain": ij.Tucker2Conv(8, 3, 3, 4),
    "strided": ij.Tucker2Conv(8, 3, 3, 4, strides=2, padding=1, use_bias=False),
    "mirrored": ij.Tucker2Conv(8, 3, 3, 4, padding="REFLECT"),
    "groups": ij.Tucker2Conv(8, 3, 2, 3, feature_group_count=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_trained_the_same_on_tpus(name, monkeypatch):
    layer = LAYERS[name]
    variables = layer.init(jax.random.key(1), IMAGES)

    def results(train):
        def f(variables, x):
            return layer.apply(variables, x, train=train)

        y, pullback = jax.vjp(jax.jit(f), variables, IMAGES)
        return y, pullback(jnp.cos(y))

    expected = results(train=True)
    joined = []

    def as_on_tpu(*args, default, tpu=None, **_):
        joined.append(getattr(tpu, "__name__", None) == "joined")
        return (tpu or default)(*args)

    monkeypatch.setattr(lax, "platform_dependent", as_on_tpu)
    results(train=False)
    assert not any(joined)
    found = results(train=True)
    assert any(joined) == (name != "groups")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The same sums of at most 144 products, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_core_is_computed_once():
    layer = LAYERS["plain"]
    variables = layer.init(jax.random.key(1), IMAGES)
    f = functools.partial(layer.apply, train=True)
    program = jax.jit(f).lower(variables, IMAGES).compile()
    # On 144 pixels: two factors and the core, whose taps beyond the image count less.
    macs = 144 * (6 * 3 + 9 * 3 * 4 + 4 * 8)
    assert 0.8 < program.cost_analysis()["flops"] / (2 * macs) < 1.2


def test_what_takes_a_core_s_output_still_gets_and_changes_it():
    layer = LAYERS["plain"]
    variables = layer.init(jax.random.key(1), IMAGES)

    def doubled(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        return 2 * y if context.module.name == "core" else y

    @jax.jit
    def apply(variables):
        with nn.intercept_methods(doubled):
            return layer.apply(variables, IMAGES, train=True)

    expected = layer.apply(variables, IMAGES)
    np.testing.assert_allclose(apply(variables), 2 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "features", "pays"),
    # By hand, in cycles of a pixel: 0.5 and 0.64, 1 and 1.28, 3.5 and 2.56; of the few
    # features of a narrow network, 0.25 and 0.25.
    [(24, 64, True), (48, 128, True), (96, 256, False), (3, 8, True)],
)
def test_narrow_cores_are_joined(rank, features, pays):
    assert joining_pays((3, 3, rank, rank), (1, 1, rank, features)) == pays
