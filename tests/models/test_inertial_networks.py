"""Networks with inertial layers by plan: their shapes, and weights in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.models.create import input_shape
from inertia_jax.models.layers import Layers


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


SPECS = [
    *(ij.Inertial(m, d) for m, d in ((1, 3), (3, 5), (1, 4), (1, 2))),
    *(ij.Inertial(m, d, reading="tiled") for m, d in ((3, 4), (3, 6), (2, 4))),
    ij.Conv(kernel_size=1),
]


def output_shapes(model, shape):
    shapes = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            shapes["/".join(context.module.path)] = output.shape
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "vgg16", "simpledla", "resnet20", "lenet"]
)
def test_every_layer_keeps_its_output_shape(name):
    model = ij.create_model(name, width=0.0625)
    shape = input_shape(model)
    dense = output_shapes(model, shape)
    # Tracing a large network takes seconds: each takes other kinds.
    first, step = {"lenet": (0, 1), "resnet20": (1, 4), "vgg16": (2, 4)}.get(
        name, (0, 4)
    )
    for spec in SPECS[first::step]:
        changed = model.clone(plan=ij.Plan((("*", spec),)))
        assert output_shapes(changed, shape) == dense, spec


class Pair(nn.Module):
    """Two convolutions by plan, the second of stride 2."""

    plan: ij.Plan

    @nn.compact
    def __call__(self, x, *, train=False):
        make = Layers(self.plan, jnp.float32, None, train)
        x = make.conv(self, "first", x, 4, 3, padding=1)
        return make.conv(self, "second", x, 6, 3, strides=2, padding=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inertial", "conv"),
    [
        *(
            (ij.Inertial(1, d, threshold=ij.Fixed.CLOSED), ij.Conv(1))
            for d in (2, 3, 4)
        ),
        (ij.Inertial(3, 5, threshold=ij.Fixed.CLOSED), ij.Conv()),
        *(
            (ij.Inertial(3, d, reading="tiled", threshold=ij.Fixed.OPEN), ij.Conv())
            for d in (4, 5, 6)
        ),
    ],
    ids=lambda s: f"{s.core_size},{s.region_size}" if hasattr(s, "low") else "",
)
def test_closed_windows_and_open_tiles_are_the_convolution_at_its_place(inertial, conv):
    x = jnp.asarray(normal(2, 9, 10, 3))
    replaced = Pair(ij.Plan((("*", inertial),)))
    plain = Pair(ij.Plan((("*", conv),)))
    variables = jax.jit(replaced.init)(jax.random.key(0), x)
    expected = jax.jit(plain.apply)({"params": variables["params"]}, x)
    actual = jax.jit(replaced.apply)(variables, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_strided_layers_stay_dense_under_tiles_and_say_so():
    spec = ij.Inertial(3, 4, reading="tiled")
    model = ij.create_model("resnet20", width=0.25, plan=ij.Plan((("*", spec),)))
    table = ij.count_cost(model, (32, 32, 3))
    dense = [row.path for row in table.rows if row.kind == "conv"]
    assert dense == ["layer2_0/conv1", "layer3_0/conv1"]
    noted = [line for line in str(table).splitlines() if "stays dense" in line]
    assert [line.split()[0] for line in noted] == dense
    assert all("tiles need stride 1, it has 2" in line for line in noted)


# Weights in and out


@pytest.mark.slow
def test_dense_weights_fit_a_tiled_network():
    dense = ij.create_model("lenet", width=0.2)
    variables = ij.init_variables(dense, jax.random.key(0))
    state, x = ij.to_torch(dense, variables), normal(2, 28, 28, 1)

    def tiled(threshold):
        spec = ij.Inertial(3, 4, reading="tiled", threshold=threshold)
        model = dense.clone(plan=ij.Plan((("*", spec),)))
        return model, ij.load_torch(model, state)

    model, opened = tiled(ij.Fixed.OPEN)
    assert jax.tree.leaves(opened["thresholds"]) == [-1, -1]
    expected = jax.jit(dense.apply)(variables, x)
    actual = jax.jit(model.apply)(opened, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    _, learned = tiled(ij.Learned(0.7))
    assert learned["params"]["conv1"]["threshold"] == np.float32(0.7)


@pytest.fixture
def inertial_net():
    """A LeNet with each kind of variable, none at its first value."""
    first = ij.Inertial(
        1,
        3,
        combine="weighted_channel",
        relative=True,
        threshold=ij.Learned(per_channel=True),
    )
    second = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5))
    plan = ij.Plan((("conv1", first), ("conv2", second)))
    model = ij.create_model("lenet", width=0.2, plan=plan)
    variables = ij.init_variables(model, jax.random.key(0))
    draw = lambda a: jnp.asarray(normal(*a.shape))  # noqa: E731
    variables["params"] = jax.tree.map(draw, variables["params"])
    changed = {
        "thresholds": {"conv2": {"threshold": jnp.float32(2.5)}},
        "batch_stats": {"conv1": {"friction_mean": jnp.float32(0.4)}},
    }
    assert jax.tree.structure(variables) == jax.tree.structure(variables | changed)
    return model, variables | changed


def test_an_inertial_network_goes_to_torch_and_back(inertial_net):
    model, variables = inertial_net
    with pytest.warns(UserWarning, match="in place of conv1, conv2 give other"):
        state = ij.to_torch(model, variables)
    assert state["conv2.threshold"] == 2.5
    assert state["conv1.weights"].shape == (6, 3, 3)
    loaded = ij.load_torch(model, state)
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))


@pytest.mark.slow
def test_an_inertial_network_is_the_same_after_a_checkpoint(inertial_net, tmp_path):
    model, variables = inertial_net
    ij.save_checkpoint(tmp_path / "checkpoint", model, variables)
    loaded_model, loaded = ij.load_checkpoint(tmp_path / "checkpoint")
    assert loaded_model == model
    apply, x = jax.jit(model.apply), normal(2, 28, 28, 1)
    np.testing.assert_array_equal(apply(loaded, x), apply(variables, x))
