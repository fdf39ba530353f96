"""BatchNorm as it trains, beside Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from inertia_jax.batch_norm import BatchNormToTrain

pytestmark = pytest.mark.usefixtures("optimised")

OPTIONS = {"momentum": 0.9, "epsilon": 1e-5}


def images(*shape, mean=0.0, dtype=np.float32):
    values = np.random.default_rng(1).normal(mean, 1, shape)
    return jnp.asarray(values, dtype)


def variables(channels, dtype=np.float32):
    rng = np.random.default_rng(2)
    draw = lambda: jnp.asarray(rng.uniform(0.5, 1.5, channels), dtype)  # noqa: E731
    return {
        "params": {"scale": draw(), "bias": draw()},
        "batch_stats": {"mean": draw(), "var": draw()},
    }


def both(**options):
    ours = BatchNormToTrain(**OPTIONS, **options)
    return ours, nn.BatchNorm(use_running_average=False, **OPTIONS, **options)


def trained(layer, state, x):
    """Returns the output, its gradients for x and parameters, and the statistics."""

    def loss(params, x):
        y, moved = layer.apply({**state, "params": params}, x, mutable=["batch_stats"])
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (weights * jnp.maximum(y, 0)).sum(), (y, moved)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    gradients, (y, moved) = jax.jit(gradient)(state["params"], x)
    return y, gradients, moved


def types(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(8, 5, 6, 7), (64, 3)])
def test_everything_is_as_flax_has_it(shape, mean):
    state, x = variables(shape[-1]), images(*shape, mean=mean)
    ours, theirs = (trained(layer, state, x) for layer in both())
    # Sums of some hundred terms in another order, which a large mean makes coarser.
    close = dict(rtol=1e-4, atol=1e-4 * (1 + mean**2 / 10))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), ours, theirs)


def test_everything_is_as_flax_has_it_in_float64(x64):
    state = variables(7, np.float64)
    x = images(8, 5, 6, 7, mean=30.0, dtype=np.float64)
    options = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    ours, theirs = (trained(layer, state, x) for layer in both(**options))
    assert types(ours) == types(theirs)
    close = dict(rtol=1e-10, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), ours, theirs)


def test_bfloat16_has_float32_statistics():
    state, x = variables(7), images(8, 5, 6, 7, dtype=jnp.bfloat16)
    ours, theirs = (trained(layer, state, x) for layer in both(dtype=jnp.bfloat16))
    assert types(ours) == types(theirs)
    assert ours[0].dtype == jnp.bfloat16
    # Statistics are sums in float32 of the same numbers, outputs are rounded to 8 bits.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours[2], theirs[2]
    )
    np.testing.assert_allclose(
        ours[0].astype(np.float32), theirs[0].astype(np.float32), rtol=2**-7, atol=0.02
    )


def test_variables_are_flaxs_and_initialising_moves_nothing():
    x = images(4, 3, 3, 5, mean=2.0)
    ours, theirs = (
        layer.init(jax.random.key(0), x) for layer in both(axis_name="data")
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_devices_share_their_statistics():
    state, x = variables(5), images(16, 4, 4, 5)
    layer = BatchNormToTrain(**OPTIONS, axis_name="data")

    def apply(x):
        return layer.apply(state, x, mutable=["batch_stats"])

    split = x.reshape(8, 2, 4, 4, 5)
    y, moved = jax.pmap(apply, axis_name="data")(split)
    whole, once = BatchNormToTrain(**OPTIONS).apply(state, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(x.shape), whole, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[3], b, rtol=1e-5), moved, once
    )


def test_forward_mode_is_the_transpose_of_reverse_mode():
    state, x = variables(5), images(4, 3, 3, 5)
    layer = BatchNormToTrain(**OPTIONS)
    function = lambda x: layer.apply(state, x, mutable=["batch_stats"])[0]  # noqa: E731
    along = images(4, 3, 3, 5)[::-1] ** 2
    weights = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    _, tangent = jax.jvp(function, (x,), (along,))
    _, transpose = jax.vjp(function, x)
    (cotangent,) = transpose(weights)
    np.testing.assert_allclose(
        (weights * tangent).sum(), (cotangent * along).sum(), rtol=1e-4
    )


def sums_over_images(layer, state, x):
    """Counts the sums over whole images that the reverse mode takes."""

    def backward(params, x, cotangent):
        def run(params, x):
            held = {**state, "params": params}
            return layer.apply(held, x, mutable=["batch_stats"])

        _, transpose, _ = jax.vjp(run, params, x, has_aux=True)
        return transpose(cotangent)

    jaxpr = jax.make_jaxpr(backward)(state["params"], x, x)
    found = str(jaxpr).count("reduce_sum")
    # Forward: those of x and of its square.
    return found - 2


def test_reverse_mode_sums_twice_where_flax_sums_more():
    state, x = variables(5), images(4, 3, 3, 5)
    ours, theirs = (sums_over_images(layer, state, x) for layer in both())
    assert ours == 2
    assert theirs > 2


def test_a_constant_channel_has_finite_gradients():
    x = images(4, 3, 3, 5).at[..., 2].set(7.0)
    _, gradients, _ = trained(BatchNormToTrain(**OPTIONS), variables(5), x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
