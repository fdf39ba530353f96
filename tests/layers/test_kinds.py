"""What each kind of layer is made of."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from inertia_jax.layers import kinds
from inertia_jax.plan.specs import Spec

INERTIAL = ij.Inertial(3, 4, reading="tiled")
LARGEST = ij.Inertial(3, 4, combine="max")
LAYERS = {
    "conv": nn.Conv(6, (3, 3), feature_group_count=2),
    "dense": nn.Dense(6),
    "inertial": ij.InertialConv(6, 3, 4, combine="sum"),
    "tucker2": ij.Tucker2Conv(6, (3, 2), 2, 1, feature_group_count=2),
    "low_rank": ij.LowRankConv(6, 2, feature_group_count=2),
}


def leaves_of(layer):
    variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
    leaves = traverse_util.flatten_dict(variables["params"], sep="/")
    # A bias that is not 0, as it is drawn.
    return {n: v + (n.endswith("bias")) for n, v in leaves.items()}


def test_every_spec_has_a_kind_whose_layer_has_its_fields():
    assert {kind.spec for kind in kinds.KINDS.values()} == {None, *get_args(Spec)}
    for layer, kind in kinds.KINDS.items():
        if kind.spec is not None:
            fields = {f.name for f in dataclasses.fields(kind.spec)}
            assert fields <= {f.name for f in dataclasses.fields(layer)}
            assert {*kind.ranks} <= fields


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_parts_are_the_layers_own_in_order(name):
    layer = LAYERS[name]
    assert kinds.kind_of(layer).name == name
    called = []

    def record(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.path:
            called.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        leaves = leaves_of(layer)
    assert kinds.kind_of(layer).parts == tuple(called)
    kernel = leaves[kinds.output_kernel(layer)]
    assert kernel.shape[-1] == 6
    np.testing.assert_array_equal(kinds.bias_of(leaves), np.ones(6))


def test_layers_without_bias_and_layers_of_others_have_none():
    assert kinds.bias_of(leaves_of(nn.Conv(6, (1, 1), use_bias=False))) is None
    assert kinds.kind_of(nn.LayerNorm()).name == "other"
    with pytest.raises(ValueError, match="`module` .*LayerNorm.* a convolution"):
        kinds.spec_of(nn.LayerNorm())


@pytest.mark.parametrize("name", ["conv", "tucker2", "low_rank"])
def test_the_dense_kernel_is_the_layer(name):
    layer = LAYERS[name]
    leaves = leaves_of(layer)
    kernel = kinds.dense_kernel(layer, leaves)
    dense = nn.Conv(6, kernel.shape[:2], feature_group_count=2)
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 4)).astype(np.float32)
    params = traverse_util.unflatten_dict(leaves, sep="/")
    np.testing.assert_allclose(
        dense.apply({"params": {"kernel": kernel, "bias": jnp.ones(6)}}, x),
        layer.apply({"params": params}, x),
        rtol=1e-5,  # float32, summed in another order
        atol=1e-5,
    )


def test_a_layer_says_what_a_plan_says():
    assert kinds.spec_of(LAYERS["conv"]) == ij.Conv()
    assert kinds.spec_of(LAYERS["inertial"]) == ij.Inertial(3, 4, combine="sum")
    assert kinds.spec_of(LAYERS["low_rank"]) == ij.LowRank(2)
    layer = ij.Tucker2Conv(6, 3, 2, 4, core=INERTIAL)
    assert kinds.spec_of(layer) == ij.Tucker2(2, 4, core=INERTIAL)
    assert kinds.ranks_of(layer) == kinds.ranks_of(kinds.spec_of(layer)) == (2, 4)


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (LAYERS["conv"], ("",)),
        (LAYERS["dense"], ()),
        (LAYERS["inertial"], ("",)),
        (ij.InertialConv(6, 3, 4, combine="max"), ()),
        (LAYERS["tucker2"], ("u_in", "core", "u_out")),
        (LAYERS["low_rank"], ("left", "right")),
        (ij.Tucker2Conv(6, 3, 2, 4, core=INERTIAL), ("core", "u_out")),
        (ij.Tucker2Conv(6, 3, 2, 4, core=LARGEST), ("u_out",)),
        (nn.LayerNorm(), ()),
    ],
)
def test_linear_parts_come_after_friction_and_are_no_maximum(layer, parts):
    assert kinds.linear_parts(layer) == parts


def test_an_inertial_layer_is_made_of_a_spec_and_gives_it_back():
    spec = ij.Inertial(
        2,
        5,
        reading="tiled",
        metric="l2",
        reference="core_mean",
        relative=True,
        low="sample",
        threshold=ij.Rate(0.3),
        gate_gradient="ste",
        slope=3.0,
        channel_stride=2,
        capacities=None,
    )
    layer = ij.InertialConv.from_spec(spec, 6, use_bias=False, name="conv")
    assert (layer.spec, layer.features, layer.use_bias) == (spec, 6, False)
    assert layer.name == "conv"
