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


# The others take seconds each.
QUICK = ("causal", "1-D groups", "2-D reflect", "3-D strides", "3-D one tap")


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_every_kind_of_convolution_is_factorised(kind):
    num_axes, make = KINDS[kind]
    model, x = Net(make, num_axes), images(num_axes)
    shape = x.shape[1:]
    variables = model.init(KEY, x)
    expected = model.apply(variables, x)
    kernel = variables["params"]["layer"]["kernel"]
    taps, groups = np.prod(kernel.shape[:-2]), 4 // kernel.shape[-2]
    middle = ij.Tucker2(kernel.shape[-2], min(6 // groups, taps * kernel.shape[-2]))
    rules = (("layer", middle), ("*", ij.LowRank(4)))
    small, factors = ij.compress(
        model, variables, ranks=ij.Plan(rules), calibration=x, image_shape=shape
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
    row = ij.count_cost(model, shape).rows[1]
    out = jax.eval_shape(model.apply, variables, x).shape[1:-1]
    assert row.macs == np.prod(out) * kernel.size


class Mixed(nn.Module):
    """Linear layers around a convolution, one with arithmetic of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="before")(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.DenseGeneral((2, 3), name="general")(nn.relu(x).mean((1, 2)))
        return nn.Einsum((2, 3, 5), "nij,ijo->no", name="einsum")(x)


def test_linear_layers_are_factorised_where_asked():
    model, x = Mixed(), images(2)
    shape = x.shape[1:]
    variables = model.init(KEY, x)
    full = {"ranks": ij.Ratio(1.0), "only_cheaper": False, "image_shape": shape}
    small, _ = ij.compress(model, variables, **full)
    assert [path for path, _ in small.plan.rules] == ["conv"] and not small.kept
    small, factors = ij.compress(model, variables, linear=True, **full)
    assert small.plan.spec("before") == ij.LowRank(6)
    assert factors["params"]["before"]["right"]["kernel"].shape == (6, 6)
    assert {path: why.split(",")[0] for path, why in small.kept} == {
        "general": "is an nn.DenseGeneral",
        "einsum": "is an nn.Einsum",
    }
    close(small.apply(factors, x), model.apply(variables, x))
    back = ij.decompress(small, factors, image_shape=shape)
    jax.tree.map(close, back[1], dict(variables))
    # 8 x 6 positions; the mean leaves one.
    expected = {"conv": 48 * 9 * 24, "before": 48 * 36, "general": 36, "einsum": 30}
    rows = ij.count_cost(model, shape).rows
    assert {row.path: row.macs for row in rows} == expected
    with pytest.raises(ValueError, match="linear layers change with `linear`"):
        ij.compress(model, variables, layers="before", **full)


class Penalised(nn.Module):
    """It reads a kernel for a penalty, in training alone."""

    @nn.compact
    def __call__(self, x, train=False):
        conv, other = nn.Conv(4, (3, 3), name="conv"), nn.Conv(4, (3, 3), name="other")
        x = other(conv(x))
        if train:
            return x, jnp.sum(conv.variables["params"]["kernel"] ** 2)
        return x


def test_kernels_that_training_reads_stay():
    model, x = Penalised(), images(2)
    small, factors = ij.compress(
        model, model.init(KEY, x), ranks=ij.Ratio(0.5), image_shape=x.shape[1:]
    )
    assert "in training" in dict(small.kept)["conv"]
    assert [path for path, _ in small.plan.rules] == ["other"]
    assert small.apply(factors, x, train=True)[1] > 0


def test_batch_norm_is_folded_into_layers_with_a_slash_in_their_names():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), use_bias=False, name="a/b")(x)
            return nn.BatchNorm(use_running_average=True, name="n/m")(x)

    model, x = Named(), images(2)
    variables = model.init(KEY, x)
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=x.shape[1:])
    assert folded.folded == (("a/b", "n/m"),)
    assert {*merged["params"]["a/b"]} == {"kernel", "bias"}
    close(folded.apply(merged, x), model.apply(variables, x))
