"""Networks of this library in int8, by qwix: after training, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import inertia_jax as ij

qwix = pytest.importorskip("qwix", reason="needs the extra `int8`")

RULES = [qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)]
SHAPE = (8, 8, 6)
IMAGES = jax.random.normal(jax.random.key(1), (4, *SHAPE))
pytestmark = [
    # qwix's kernels are of its own type, which checks of shapes do not take for arrays.
    pytest.mark.usefixtures("no_shape_checks"),
    # qwix 0.1.8 uses names that Flax 0.12 has renamed.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
]


class Net(nn.Module):
    """Somebody's own network."""

    @nn.compact
    def __call__(self, x, *, train=False):
        for features in (16, 24):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean((1, 2)))


def compressed():
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    return ij.compress(model, variables, ranks=ij.Ratio(0.5), image_shape=SHAPE)


def folded():
    return ij.fold_batch_norm(*compressed(), image_shape=SHAPE)


def planned(spec):
    model = ij.create_model("lenet", width=0.25, plan=ij.Plan((("conv2", spec),)))
    return model, ij.init_variables(model, jax.random.key(0), SHAPE)


NETWORKS = {
    "one's own, compressed": compressed,
    "one's own, compressed and folded": folded,
    "factors": lambda: planned(ij.Tucker2(4, 6)),
    "tiles": lambda: planned(ij.Inertial(3, 4, reading="tiled")),
    "window": lambda: planned(ij.Inertial(1, 3)),
    "periphery": lambda: planned(
        ij.Inertial(2, 4, combine="weighted_periphery", threshold=ij.Fixed.OPEN)
    ),
}


def in_int8(model, variables):
    """Returns the network that qwix makes after training, with its variables."""
    quantised = qwix.quantize_model(model, qwix.PtqProvider(RULES))
    shapes = jax.eval_shape(quantised.init, jax.random.key(0), IMAGES)
    params = qwix.quantize_params(variables["params"], shapes["params"])
    return quantised, {**variables, "params": params}


def assert_near(gradients, expected):
    leaves = map(jax.tree.leaves, (gradients, expected))
    for a, b in zip(*leaves, strict=True):
        # Rounding by up to 1/254 of the largest entry, forwards and in what is kept.
        assert 0 < np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_int8_keeps_every_kernel_in_a_byte_and_the_output_near(name):
    model, variables = NETWORKS[name]()
    expected = jax.jit(model.apply)(variables, IMAGES)
    quantised, small = in_int8(model, variables)
    sizes = [x.size for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
    stored = [x for x in jax.tree.leaves(small["params"]) if x.dtype == jnp.int8]
    assert sorted(x.size for x in stored) == sorted(sizes)
    error = jax.jit(quantised.apply)(small, IMAGES) - expected
    # int8 rounds by up to 1/254 of the largest entry, a few layers deep.
    assert 0 < np.abs(error).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_a_file_keeps_every_kernel_in_a_byte_and_gives_the_same_numbers(tmp_path):
    model = ij.create_model("lenet")
    network = (model, ij.init_variables(model, jax.random.key(0), SHAPE))
    sizes = [x.size for x in jax.tree.leaves(network[1]["params"]) if x.ndim > 1]
    quantised, small = in_int8(*network)
    options = {"image_shape": SHAPE, "platforms": ("cpu",)}
    ij.save_exported(tmp_path / "float32", network, **options)
    ij.save_exported(tmp_path / "int8", (quantised, small), **options)
    logits = ij.load_exported(tmp_path / "int8")(IMAGES)
    expected = jax.jit(quantised.apply)(small, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    before, after = ((tmp_path / f).stat().st_size for f in ("float32", "int8"))
    # Three of four bytes of a kernel's number go; scales and rounding take kilobytes.
    assert before - after > 2.5 * sum(sizes)


@pytest.mark.slow
def test_an_nnx_module_keeps_its_factors_in_a_byte_and_trains_so():
    rngs = nnx.Rngs(0)
    dense = nnx.Sequential(
        nnx.Conv(6, 8, (3, 3), rngs=rngs), nnx.Conv(8, 12, (1, 1), rngs=rngs)
    )
    ranks = ij.Plan((("*0", ij.Tucker2(4, 5)), ("*1", ij.LowRank(3))))
    small = ij.compress(dense, ranks=ranks, image_shape=SHAPE)
    expected = small(IMAGES)
    quantised = qwix.quantize_model(small, qwix.PtqProvider(RULES), IMAGES)
    stored = [x for x in jax.tree.leaves(nnx.state(quantised)) if x.dtype == jnp.int8]
    assert sorted(x.size for x in stored) == sorted([24, 180, 40, 24, 36])
    error = nnx.jit(lambda model, x: model(x))(quantised, IMAGES) - expected
    assert 0 < np.abs(error).max() < 0.05 * np.abs(expected).max()

    gradients = nnx.jit(nnx.grad(lambda model: (model(IMAGES) ** 2).sum()))
    in_training = qwix.quantize_model(small, qwix.QtProvider(RULES), IMAGES)
    assert_near(gradients(in_training), gradients(small))


@pytest.mark.parametrize(
    "layer",
    [
        ij.Tucker2Conv(8, 3, 4, 5),
        ij.InertialConv(8, 3, 4, reading="tiled"),
        ij.InertialConv(8, 1, 3, combine="weighted_input"),
        ij.InertialConv(8, 2, 4, combine="weighted_periphery"),
    ],
    ids=["factors", "tiles", "window", "periphery"],
)
def test_training_in_int8_has_nearly_the_gradients_of_training(layer):
    variables = jax.jit(layer.init)(jax.random.key(0), IMAGES)

    def gradients(layer):
        def loss(params):
            inside = {**variables, "params": params}
            return (layer.apply(inside, IMAGES, train=True, mutable=True)[0] ** 2).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    quantised = qwix.quantize_model(layer, qwix.QtProvider(RULES))
    assert_near(gradients(quantised), gradients(layer))
