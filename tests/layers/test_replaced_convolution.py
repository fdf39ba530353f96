"""Layers while something stands in the place of JAX's convolution, as qwix does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import inertia_jax as ij
from inertia_jax.ops.conv.replaced import is_replaced

IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 6))
LAYERS = {
    "Tucker-2": ij.Tucker2Conv(8, 3, 4, 5, padding=1),
    "groups": ij.Tucker2Conv(8, (3, 1), 2, 3, strides=2, feature_group_count=2),
    "low rank": ij.LowRankConv(8, 3, strides=2),
    "tiles": ij.InertialConv(8, 3, 4, reading="tiled", threshold=ij.Fixed(0.8)),
    "window": ij.InertialConv(8, 1, 3, threshold=ij.Fixed(0.8)),
    "weighted input": ij.InertialConv(8, 1, 3, combine="weighted_input"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_replacement_sees_each_kernel_once_and_numbers_stay(name, monkeypatch):
    layer = LAYERS[name]
    variables = layer.init(jax.random.key(0), IMAGES)
    expected = layer.apply(variables, IMAGES)
    convolve, seen = lax.conv_general_dilated, []

    def replacement(lhs, rhs, *args, **kwargs):
        seen.append(rhs)
        return convolve(lhs, rhs, *args, **kwargs)

    monkeypatch.setattr(lax, "conv_general_dilated", replacement)
    y = layer.apply(variables, IMAGES)
    kernels = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    # The parameters themselves: whoever replaces the function looks them up.
    assert sorted(map(id, seen)) == sorted(map(id, kernels))
    # The same sums of at most 54 products, in another order.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Tucker-2", "tiles", "window"])
def test_a_replacement_stands_outside_branches_and_other_gradients(name, monkeypatch):
    layer = LAYERS[name]
    variables = layer.init(jax.random.key(0), IMAGES)
    convolve = lax.conv_general_dilated
    monkeypatch.setattr(
        lax, "conv_general_dilated", lambda *args, **kwargs: convolve(*args, **kwargs)
    )
    for train in (False, True):
        apply = lambda x, train=train: layer.apply(variables, x, train=train)  # noqa: E731
        text = str(jax.make_jaxpr(apply)(IMAGES))
        convolutions = [text.find("conv_general_dilated["), text.find("cond[")]
        assert convolutions[0] > 0 > convolutions[1]
        assert "dot_general" not in text
        assert "custom_vjp" not in text


def test_code_put_into_jax_s_function_replaces_it(monkeypatch):
    assert not is_replaced()
    other = lambda *args, **kwargs: jnp.zeros(())  # noqa: E731
    monkeypatch.setattr(lax.conv_general_dilated, "__code__", other.__code__)
    assert is_replaced()
    monkeypatch.undo()
    assert not is_replaced()
