"""BatchNorm recalibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import inertia_jax as ij


class TwoNorms(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        for momentum in (0.9, 0.5):
            x = nn.relu(nn.BatchNorm(not train, momentum=momentum)(x))
        return x


def test_recalibrated_statistics_are_those_of_all_images():
    rng = np.random.default_rng(0)
    # Batches of unlike means, and three images that fill no batch.
    x = rng.normal(size=(27, 4, 5, 3)) + np.arange(27).reshape(-1, 1, 1, 1) // 8
    x = x.astype(np.float32)
    start = TwoNorms().init(jax.random.key(0), x)
    scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
    params = {**start["params"], "BatchNorm_0": {"scale": scale, "bias": bias}}
    variables = {**start, "params": params, "other": {"kept": jnp.ones(2)}}
    recalibrated = ij.recalibrate_batch_norm(TwoNorms(), variables, x, batch_size=8)
    batches = x[:24].reshape(3, 8, 4, 5, 3)
    mean, var = (f(batches, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    second = np.maximum((batches - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
    for name, values in (("BatchNorm_0", batches), ("BatchNorm_1", second)):
        found = recalibrated["batch_stats"][name]
        values = values.reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found["var"], values.var(0), rtol=1e-4)
    kept = ("params", "other")
    jax.tree.map(
        np.testing.assert_array_equal,
        {name: recalibrated[name] for name in kept},
        {name: variables[name] for name in kept},
    )


@pytest.mark.slow
def test_mean_friction_is_recalibrated_too():
    layer = ij.InertialConv(2, 1, 3, relative=True)
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 2)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    found = ij.recalibrate_batch_norm(layer, variables, x, batch_size=4)
    expected = ij.ops.friction(x, region_size=3, core_size=1).mean()
    mean = found["batch_stats"]["friction_mean"]
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("drop", "num_images", "batch_size", "message"),
    [
        (True, 4, 2, "no `batch_stats` of BatchNorm"),
        (False, 1, 2, "number of `images` .*must be >= 2"),
        (False, 4, 1, "`batch_size` .*must be >= 2"),
    ],
)
def test_recalibration_refuses_what_has_no_statistics(
    drop, num_images, batch_size, message
):
    x = np.ones((num_images, 2, 2, 3), np.float32)
    variables = TwoNorms().init(jax.random.key(0), x)
    variables = {"params": variables["params"]} if drop else variables
    with pytest.raises(ValueError, match=message):
        ij.recalibrate_batch_norm(TwoNorms(), variables, x, batch_size=batch_size)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_statistics_are_measured_in_float32(dtype):
    x = 2 * noise(16, 4, 5, 3) + 1
    wide = TwoNorms().init(jax.random.key(0), x)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), wide)
    expected, found = (
        ij.recalibrate_batch_norm(TwoNorms(), variables, x, batch_size=8)
        for variables in (wide, narrow)
    )
    for name, stats in expected["batch_stats"].items():
        for kind, values in stats.items():
            again = found["batch_stats"][name][kind]
            assert again.dtype == dtype
            # The stored value is rounded once, its inputs once or twice.
            np.testing.assert_allclose(
                again.astype(jnp.float32), values, rtol=0, atol=0.01 * values.max()
            )


class Others(nn.Module):
    """What modules other than BatchNorm keep in `batch_stats`."""

    @nn.compact
    def __call__(self, x, *, train=False):
        stat = lambda name, value: self.variable("batch_stats", name, lambda: value)  # noqa: E731
        count, mean = stat("count", jnp.int32(3)), stat("mean", jnp.full(3, 5.0))
        last = stat("last", jnp.zeros(3))
        if train:
            count.value += 1
            mean.value = 0.9 * mean.value + 0.1 * x.mean((0, 1, 2))
            last.value = x[0, 0, 0]
        # The outputs depend on them.
        x = x + (mean.value + count.value).reshape(1, 1, 1, 3)
        dense = nn.SpectralNorm(nn.Dense(4))
        x = nn.BatchNorm(not train, name="bn")(dense(x, update_stats=train))
        return Welford(name="welford")(x, train=train)


class Welford(nn.Module):
    """Mean and variance of all images so far, which are no moving averages."""

    @nn.compact
    def __call__(self, x, *, train):
        stat = lambda name: self.variable("batch_stats", name, jnp.ones, 4)  # noqa: E731
        count, mean, var = stat("count"), stat("mean"), stat("var")
        if train:
            step = x.mean((0, 1, 2)) - mean.value
            count.value += 1
            mean.value += step / count.value
            var.value += step**2
        return x / jnp.sqrt(var.value).reshape(1, 1, 1, 4)


def test_statistics_of_other_modules_are_left_alone():
    x = noise(8, 4, 4, 3)
    variables = Others().init(jax.random.key(0), x)
    found = ij.recalibrate_batch_norm(Others(), variables, x, batch_size=8)
    stats, before = found["batch_stats"], variables["batch_stats"]
    norms = ("bn",)
    assert (
        set(stats)
        == set(before)
        == {"count", "mean", "last", "welford", *norms} | {"SpectralNorm_0"}
    )
    for name in set(stats) - {*norms}:
        jax.tree.map(np.testing.assert_array_equal, stats[name], before[name])
    # The mean of what BatchNorm sees, under the others' statistics as they are.
    _, changed = Others().apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(
        stats["bn"]["mean"], changed["batch_stats"]["bn"]["mean"] / 0.01, rtol=1e-4
    )
    only = {"params": {}, "batch_stats": {"welford": before["welford"]}}
    with pytest.raises(ValueError, match="no `batch_stats` of BatchNorm"):
        ij.recalibrate_batch_norm(Others(), only, x)


def test_frozen_and_boxed_variables_are_taken():
    x = noise(8, 4, 4, 3)
    variables = TwoNorms().init(jax.random.key(0), x)
    expected = ij.recalibrate_batch_norm(TwoNorms(), variables, x)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,)), variables)
    for other in (freeze(variables), boxed):
        found = ij.recalibrate_batch_norm(TwoNorms(), other, x)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


class Undefined(nn.Module):
    """Not finite on blank images, as are networks that normalise their inputs."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x / x.std((1, 2, 3), keepdims=True)
        return nn.BatchNorm(not train, momentum=0.999)(x)


def test_blank_images_need_not_be_defined():
    x = noise(8, 4, 4, 3)
    variables = Undefined().init(jax.random.key(0), x)
    stats = ij.recalibrate_batch_norm(Undefined(), variables, x)["batch_stats"]
    scaled = (x / x.std((1, 2, 3), keepdims=True)).reshape(-1, 3)
    np.testing.assert_allclose(
        stats["BatchNorm_0"]["mean"], scaled.mean(0), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], scaled.var(0), rtol=1e-3)


class Frozen(nn.Module):
    """A BatchNorm that is never trained, before one that is."""

    is_remat: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        norm = nn.remat(nn.BatchNorm) if self.is_remat else nn.BatchNorm
        x = norm(use_running_average=True, name="frozen")(x)
        # Its gradient is given in reverse mode alone.
        x = ij.ops.max_pool2d(x, window=2)
        x = reverse_only(x)
        return nn.BatchNorm(not train, momentum=0.999, name="moving")(x)


@jax.custom_vjp
def reverse_only(x):
    return 2 * x


reverse_only.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@pytest.mark.parametrize("is_remat", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_training_leaves_as_it_is_is_used_and_kept(is_remat, dtype):
    model, x = Frozen(is_remat), noise(12, 4, 4, 3)
    variables = model.init(jax.random.key(0), x)
    stats = {"mean": jnp.array([0.5, 0, -1], dtype), "var": jnp.array([4, 1, 0], dtype)}
    stats = {**variables["batch_stats"], "frozen": stats}
    variables = {**variables, "batch_stats": stats}
    found = ij.recalibrate_batch_norm(model, variables, x, batch_size=4)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, found["frozen"], stats["frozen"])
    assert found["frozen"]["mean"].dtype == dtype
    seen = (x - [0.5, 0, -1]) / np.sqrt(np.array([4, 1, 0]) + 1e-5)
    seen = 2 * seen.reshape(12, 2, 2, 2, 2, 3).max((2, 4)).reshape(-1, 3)
    np.testing.assert_allclose(found["moving"]["mean"], seen.mean(0), rtol=1e-3)
    np.testing.assert_allclose(found["moving"]["var"], seen.var(0), rtol=1e-3)


class AllFrozen(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dropout(0.0)(x, deterministic=not train)
        return nn.BatchNorm(use_running_average=True)(x)


def test_a_network_whose_statistics_never_move_keeps_them():
    x = noise(4, 4, 4, 3)
    variables = AllFrozen().init(jax.random.key(0), x)
    found = ij.recalibrate_batch_norm(AllFrozen(), variables, x)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
