"""Networks as source of PyTorch: the same logits, and the keys of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.metadata import Preprocessing
from inertia_jax.models.create import abstract_variables
from inertia_jax.torch_source.module import torch_source
from train.data.augment import Augmentation

torch = pytest.importorskip("torch")

TILED = ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed(0.6))
SAMPLED = ij.Inertial(
    *(3, 5),
    reading="tiled",
    low="sample",
    reference="core_mean",
    metric="l2",
    threshold=ij.Fixed(0.6),
)


def window(**fields):
    return ij.Inertial(3, 5, threshold=ij.Fixed(0.6), **fields)


def draw(shapes, seed=1):
    """Variables under which no layer's outputs vanish or explode."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 1
        return np.asarray(scale * rng.uniform(-1.5, 1.5, leaf.shape), np.float32)

    variables = jax.tree.map(one, dict(shapes))
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(
            lambda a: np.asarray(np.abs(a) + np.float32(0.1)), variables["batch_stats"]
        )
    if "thresholds" in variables:  # among the frictions of these networks
        variables["thresholds"] = jax.tree.map(
            lambda a: np.asarray(0.4, a.dtype), variables["thresholds"]
        )
    return variables


def run(source, images):
    """Logits of the source, run with nothing but what it imports."""
    assert "inertia_jax" not in source.code and "jax" not in source.code
    names = {"__name__": "network"}
    exec(compile(source.code, "network.py", "exec"), names)
    network = names["Network"]()
    state = {key: torch.from_numpy(value) for key, value in source.state.items()}
    network.load_state_dict(state)
    with torch.no_grad():
        return network, network.eval()(
            torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        ).numpy()


def assert_same(model, variables, shape, call=None):
    """Returns the source and the module, whose logits are those of JAX."""
    call = call or (lambda variables, x: model.apply(variables, x))
    source = torch_source(call, variables, image_shape=shape)
    images = np.random.default_rng(2).normal(size=(3, *shape)).astype(np.float32)
    expected = np.asarray(jax.jit(call)(variables, images))
    assert expected.std() > 1e-2
    network, found = run(source, images)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    return source, network


def made(name, shape, rules=(), **options):
    model = ij.create_model(name, num_classes=4, plan=ij.Plan(rules), **options)
    return model, draw(abstract_variables(model, shape))


def test_a_residual_network_has_pytorchs_keys_and_is_read_again():
    rules = (
        ("layer2_0/conv1", ij.Tucker2(2, 3)),
        ("layer2_0/shortcut*", ij.LowRank(2)),
    )
    shape = (16, 16, 3)
    model, variables = made("resnet18", shape, rules, width=0.0625)
    source, network = assert_same(model, variables, shape)
    expected = ij.to_torch(model, variables)
    assert set(source.state) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(source.state[key], value)
    again = ij.load_torch(model, source.state, image_shape=shape)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(again), variables))
    for layer, count in (("conv1", 3), ("shortcut.0", 2)):
        parts = network.get_submodule(f"layer2.0.{layer}")
        assert isinstance(parts, torch.nn.Sequential)
        assert [type(part) for part in parts] == [torch.nn.Conv2d] * count


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        TILED,
        SAMPLED,
        window(),
        window(combine="max"),
        window(combine="stack"),
        window(combine="weighted", relative=True),
        ij.Tucker2(4, 4, core=TILED),
    ],
    ids=lambda spec: getattr(spec, "combine", "core") + getattr(spec, "low", ""),
)
def test_inertial_layers_are_written_out(spec):
    shape = (28, 28, 1)
    model, variables = made("lenet", shape, (("conv2", spec),))
    source, _ = assert_same(model, variables, shape)
    with pytest.warns(UserWarning, match="PyTorch has no inertial layers"):
        theirs = ij.to_torch(model, variables)
    ours, theirs = (
        {key for key in state if key.startswith("conv2.")}
        for state in (source.state, theirs)
    )
    # A few weights stand in the source as numbers.
    assert ours and theirs - ours <= {"conv2.weights"} and not ours - theirs


def test_inertial_layers_in_the_place_of_others_are_written_out():
    """The dense layer whose place they take is not in the source."""
    shape = (9, 7, 2)
    own = ij.Planned(nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(3, (3, 3))]))
    model = own.clone(plan=ij.Plan((("layers_2", TILED),)))
    variables = draw(abstract_variables(model, shape))
    source, _ = assert_same(model, variables, shape)
    assert source.code.count("nn.Conv2d(") == 1
    images = np.random.default_rng(2).normal(size=(3, *shape)).astype(np.float32)
    dense, gated = (np.asarray(m.apply(variables, images)) for m in (own, model))
    assert np.abs(dense - gated).max() > 0.01


@pytest.mark.slow
def test_gates_make_a_difference():
    """The comparison above is one of networks whose gates are open and closed."""
    shape = (28, 28, 1)
    model, variables = made("lenet", shape, (("conv2", TILED),))
    images = np.random.default_rng(2).normal(size=(3, *shape)).astype(np.float32)
    rate = model.apply(variables, images, mutable="intermediates")[1]
    (rates,) = rate["intermediates"]["conv2"]["gate_rate"]
    assert 0.05 < float(jnp.mean(rates)) < 0.95


def test_folded_networks_have_no_batch_norm():
    shape = (8, 8, 3)
    model, variables = made("resnet20", shape, width=0.2)
    folded = ij.fold_batch_norm(model, variables, image_shape=shape)
    source, network = assert_same(*folded, shape)
    assert not any("bn" in key for key in source.state)
    assert not any(
        isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()
    )


@pytest.mark.slow
def test_raw_pixels_are_resized_and_normalised_inside():
    shape = (8, 8, 3)
    model, variables = made("resnet20", shape, width=0.2)
    preprocessing = Preprocessing(shape, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 10)
    augmentation = Augmentation.plain(preprocessing, np.float32)
    call = lambda v, x: model.apply(v, augmentation.for_evaluation(x))  # noqa: E731
    source = torch_source(
        call, variables, image_shape=(14, 11, 3), image_dtype=np.uint8
    )
    rng = np.random.default_rng(3)
    images = rng.integers(256, size=(2, 14, 11, 3)).astype(np.uint8)
    expected = np.asarray(jax.jit(call)(variables, images))
    _, found = run(source, images)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


class Varied(nn.Module):
    """Layers of Flax with what this library's networks do not use."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 2), strides=2, kernel_dilation=(1, 2))(x)  # uneven zeros
        x = nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False)(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=True, use_bias=False)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = nn.avg_pool(jnp.concatenate([x, -x], -1), (2, 2))
        x = nn.silu(nn.GroupNorm(2)(x)) + nn.sigmoid(x) ** 2
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x))
        return jax.nn.log_softmax(jnp.where(x > 0, x, 0.1 * x))


def test_other_operations_of_a_network_of_ones_own():
    shape = (15, 14, 3)
    model = Varied()
    images = jnp.zeros((1, *shape))
    variables = draw(jax.eval_shape(model.init, jax.random.key(0), images))
    _, network = assert_same(model, variables, shape)
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("Conv2d") == 2 and kinds.count("Linear") == 1
    assert kinds.count("BatchNorm1d") == 1


def test_what_has_no_form_is_named():
    with pytest.raises(ValueError, match="cumsum has no form in PyTorch"):
        torch_source(lambda v, x: jnp.cumsum(x, 1), {}, image_shape=(4, 4, 3))
    with pytest.raises(ValueError, match="one array that depends on the images"):
        torch_source(lambda v, x: jnp.zeros(3), {}, image_shape=(4, 4, 3))
