"""BatchNorm as it trains, beside Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from inertia_jax.layers.batch_norm import BatchNormToTrain

pytestmark = pytest.mark.usefixtures("optimised")

OPTIONS = {"momentum": 0.9, "epsilon": 1e-5}
TYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32, "axis_name": None}


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
    options = {**OPTIONS, **TYPES, **options}
    return BatchNormToTrain(**options), nn.BatchNorm(
        use_running_average=False, **options
    )


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


@pytest.mark.slow
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


def test_a_wider_type_is_computed_in(x64):
    state, x = variables(7), images(8, 5, 6, 7)
    ours, theirs = (trained(layer, state, x) for layer in both(dtype=jnp.float64))
    assert types(ours) == types(theirs)
    assert ours[0].dtype == ours[2]["batch_stats"]["mean"].dtype == np.float64
    close = dict(rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours[0], theirs[0], **close)


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


def by_pmap(function):
    return jax.pmap(function, axis_name="data")


def by_shard_map(function):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def one(x):
        return jax.tree.map(lambda leaf: leaf[None], function(x[0]))

    return jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


@pytest.mark.parametrize("spread", [by_pmap, by_shard_map])
def test_devices_share_statistics_and_their_gradients(spread, x64):
    options = dict(dtype=jnp.float64, param_dtype=jnp.float64, axis_name="data")
    state = variables(5, np.float64)
    split = images(8, 2, 4, 4, 5, dtype=np.float64)
    ours, theirs = (
        spread(lambda x, layer=layer: trained(layer, state, x))(split)
        for layer in both(**options)
    )
    close = dict(rtol=1e-10, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), ours, theirs)
    (alone,) = both(**{**options, "axis_name": None})[:1]
    once, _, moved = trained(alone, state, split.reshape(16, 4, 4, 5))
    np.testing.assert_allclose(ours[0].reshape(once.shape), once, **close)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[3], b, **close), ours[2], moved
    )


@pytest.mark.slow
def test_forward_mode_and_second_gradients_are_flaxs(x64):
    state = variables(5, np.float64)
    x = images(4, 3, 3, 5, dtype=np.float64)
    along = jnp.asarray(np.random.default_rng(3).normal(size=x.shape))

    def derivatives(layer):
        def output(params, x):
            held = {**state, "params": params}
            return layer.apply(held, x, mutable=["batch_stats"])[0]

        def total(x):
            return (jnp.sin(output(state["params"], x)) * along).sum()

        ones = jax.tree.map(jnp.ones_like, state["params"])
        return (
            jax.jvp(output, (state["params"], x), (ones, along))[1],
            jax.jvp(jax.grad(total), (x,), (along,))[1],
            jax.vmap(total)(jnp.stack([x, 2 * x + along])),
        )

    options = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    ours, theirs = map(derivatives, both(**options))
    close = dict(rtol=1e-9, atol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), ours, theirs)


def sums_over_images(layer, state, x):
    """Counts the sums over whole images that forward and reverse mode take."""

    def backward(params, x, cotangent):
        def run(params, x):
            held = {**state, "params": params}
            return layer.apply(held, x, mutable=["batch_stats"])

        _, transpose, _ = jax.vjp(run, params, x, has_aux=True)
        return transpose(cotangent)

    def count(jaxpr):
        found = 0
        for eqn in jaxpr.eqns:
            is_sum = eqn.primitive.name == "reduce_sum"
            found += is_sum and eqn.invars[0].aval.shape == x.shape
            for inner in jaxprs_in_params(eqn.params):
                found += count(inner)
        return found

    return count(jax.make_jaxpr(backward)(state["params"], x, x).jaxpr)


def test_reverse_mode_sums_twice_where_flax_sums_three_times():
    state, x = variables(5), images(4, 3, 3, 5)
    ours, theirs = (sums_over_images(layer, state, x) for layer in both())
    # Two of them are forward: of x, and of its square.
    assert (ours, theirs) == (4, 5)


def test_a_constant_channel_has_finite_gradients():
    x = images(4, 3, 3, 5).at[..., 2].set(7.0)
    _, gradients, _ = trained(both()[0], variables(5), x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
