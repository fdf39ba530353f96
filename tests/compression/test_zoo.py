"""Models of people are compressed, trained, multiplied out again, and exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import inertia_jax as ij
from inertia_jax.calls import apply_network
from inertia_jax.inputs import one_input

KEY = jax.random.key(0)
# Layers that stay, and a word of the reason.
KEPT = {
    "unet": {"ConvTranspose_0": "nn.ConvTranspose"},
    "vae": {"decoder_0": "nn.ConvTranspose"},
    "scanned": {"blocks/a": "several layers", "blocks/b": "several layers"},
    "ensemble": {"twins/a": "several layers", "twins/b": "several layers"},
    "masked": {"masked": "mask"},
    "local": {"ConvLocal_0": "nn.ConvLocal"},
}
# The others take seconds each.
QUICK = ("rematerialised", "clinical", "video", "masked", "local")


def inputs_of(shape):
    """Random inputs; whole numbers are 0 and 1."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(2, size=leaf.shape).astype(leaf.dtype)
        return rng.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, one_input(shape, number=2))


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in zoo.MODELS
    ],
)
def test_a_model_of_someone_else_goes_all_the_way(name, tmp_path):
    (model, shape), call = zoo.MODELS[name], zoo.CALLS.get(name)
    how = {"image_shape": shape, "apply_fn": call}
    x = inputs_of(shape)
    first = (lambda m, x: call(m, x, False)) if call else (lambda m, x: m(x))
    variables = jax.jit(zoo.nn.init(first, model))({"params": KEY, "noise": KEY}, x)

    def outputs(network, values):
        run = lambda v: apply_network(network, v, x, apply_fn=call)[0]  # noqa: E731
        return jax.jit(run)(values)

    expected = outputs(model, variables)
    # Full rank loses the rounding of float32 alone.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    full = ij.compress(model, variables, ranks=ij.Ratio(1.0), only_cheaper=False, **how)
    assert full[0].plan.rules
    kept = dict(full[0].kept)
    assert kept.keys() == KEPT.get(name, {}).keys()
    assert all(word in kept[path] for path, word in KEPT.get(name, {}).items())
    jax.tree.map(close, outputs(*full), expected)
    back, dense = ij.decompress(*full, **how)
    jax.tree.map(close, outputs(back, dense), expected)

    small, factors = ij.compress(model, variables, ranks=ij.Ratio(0.5), **how)
    costs = [ij.count_cost(m, shape, apply_fn=call).params for m in (small, model)]
    assert costs[0] < costs[1]

    def loss(params):
        values = {**factors, "params": params}
        found = apply_network(small, values, x, apply_fn=call)[0]
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(found)), found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(factors["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, found)))

    if isinstance(shape, dict):  # a file takes one array
        return

    def first_output(x):
        found = apply_network(small, factors, x)[0]
        return jax.tree.leaves(found)[0]

    path = tmp_path / "small"
    options = {"image_shape": shape, "batch_size": 2, "platforms": ("cpu",)}
    ij.save_exported(path, first_output, **options)
    close(ij.load_exported(path)(x), jax.tree.leaves(found)[0])
