"""Post-training inertia."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import freeze

import inertia_jax as ij

MACS = 0.85


def smooth_images(n, size, channels, seed=0):
    """Noise that is coarse on the left and fine on the right: frictions differ."""
    rng = np.random.default_rng(seed)
    fine = rng.normal(size=(n, size, size, channels))
    coarse = fine[:, ::4, ::4].repeat(4, 1).repeat(4, 2)
    ramp = np.linspace(0, 1, size).reshape(1, 1, -1, 1)
    return (coarse + ramp**2 * fine).astype(np.float32)


# A network with BatchNorm


@pytest.fixture(scope="module")
def dense():
    """A ResNet20 whose block `layer1_1` ends in a BatchNorm of scale 0."""
    model = ij.create_model("resnet20", width=0.25)
    variables = ij.init_variables(model, jax.random.key(0))
    flat = traverse_util.flatten_dict(variables)
    path = ("params", "layer1_1", "bn2", "scale")
    flat[path] = jnp.zeros_like(flat[path])
    return model, traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def made(dense):
    """The same made inertial, and the images."""
    images = smooth_images(24, 16, 3)
    result = ij.make_inertial(
        *dense,
        macs=MACS,
        calibration=images[:16],
        recalibration=images,
        layers="layer1*",
    )
    return *result, images


def rates_of(model):
    rates = {path: spec.threshold for path, spec in model.plan.rules}
    return {p: t.target if isinstance(t, ij.Rate) else 0.0 for p, t in rates.items()}


@pytest.mark.slow
def test_the_budget_is_met_and_used(dense, made):
    model, variables, images = made
    allowed = MACS * ij.count_cost(dense[0], (16, 16, 3)).macs
    cost = ij.count_cost(model, (16, 16, 3), gate_rates=rates_of(model))
    # The last step goes as far as asked; a layer's MACs are whole, so half a MAC away.
    assert 0.999 * allowed < cost.total_macs <= allowed + len(cost.rows)
    # As evaluated, where stored statistics take the place of the batch's.
    _, sown = jax.jit(lambda x: model.apply(variables, x, mutable=["intermediates"]))(
        images
    )
    flat = traverse_util.flatten_dict(sown["intermediates"], sep="/")
    measured = {
        path.removesuffix("/gate_rate"): float(rates[0].mean())
        for path, rates in flat.items()
        if path.endswith("gate_rate")
    }
    assert measured.keys() == rates_of(model).keys()
    cost = ij.count_cost(model, (16, 16, 3), gate_rates=measured)
    assert cost.total_macs < 1.05 * allowed


@pytest.mark.slow
def test_only_layers_of_the_glob_change_and_keep_their_rate(dense, made):
    model, variables, _ = made
    assert all(path.startswith("layer1_") for path, _ in model.plan.rules)
    assert all(0 <= rate < 1 for rate in rates_of(model).values())
    for _, spec in model.plan.rules:
        assert spec.reading == "tiled" and (spec.core_size, spec.region_size) == (3, 4)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], dense[1]["params"])
    thresholds = traverse_util.flatten_dict(variables["thresholds"], sep="/")
    assert thresholds.keys() == {f"{path}/threshold" for path, _ in model.plan.rules}


@pytest.mark.slow
def test_with_every_tile_open_it_is_the_dense_network(dense, made):
    model, variables, images = made
    opened = jax.tree.map(lambda t: jnp.full_like(t, -1), variables["thresholds"])
    actual = jax.jit(model.apply)({**variables, "thresholds": opened}, images)
    recalibrated = {**dense[1], "batch_stats": variables["batch_stats"]}
    expected = jax.jit(dense[0].apply)(recalibrated, images)
    # Float32 through twenty layers, summed in another order.
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(jax.jit(model.apply)(variables, images), expected, atol=1e-3)


@pytest.mark.slow
def test_layers_that_do_not_matter_are_closed_first(dense):
    images = smooth_images(8, 16, 3)
    model, _ = ij.make_inertial(*dense, macs=0.96, calibration=images, layers="layer1*")
    assert rates_of(model).keys() <= {"layer1_1/conv1", "layer1_1/conv2"}
    assert model.plan.rules


# One without, which compiles sooner


@pytest.fixture(scope="module")
def lenet():
    model = ij.create_model("lenet", width=0.2)
    return model, ij.init_variables(model, jax.random.key(0))


@pytest.mark.slow
def test_nothing_changes_where_everything_may_stay(lenet):
    images = smooth_images(4, 28, 1)
    model, variables = ij.make_inertial(*lenet, macs=1.0, calibration=images)
    assert model == lenet[0]
    jax.tree.map(np.testing.assert_array_equal, variables, dict(lenet[1]))


@pytest.mark.slow
def test_an_impossible_budget_names_the_least_share(lenet):
    images = smooth_images(4, 28, 1)
    with pytest.raises(ValueError, match="every tile closed") as error:
        ij.make_inertial(*lenet, macs=0.01, calibration=images)
    named = float(re.search(r"at least ([\d.]+),", str(error.value))[1])
    spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed.CLOSED)
    tiled = lenet[0].clone(plan=ij.Plan((("*", spec),)))
    cost = ij.count_cost(tiled, (28, 28, 1))
    np.testing.assert_allclose(named, cost.total_macs / cost.dense_macs, atol=1e-4)


@pytest.mark.slow
def test_networks_without_batch_norm_keep_their_share_of_open_tiles(lenet):
    images = smooth_images(8, 28, 1)
    # As Flax's own tools may give them: frozen, boxed, with a collection that is empty.
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, ()), dict(lenet[1]))
    given = freeze({**boxed, "batch_stats": {}})
    model, variables = ij.make_inertial(
        lenet[0], given, macs=0.6, calibration=images, layers="conv2", low="sample"
    )
    ((path, spec),) = model.plan.rules
    assert path == "conv2" and spec.low == "sample" and 0 < spec.threshold.target < 1
    _, sown = model.apply(variables, images, mutable=["intermediates"])
    rate = sown["intermediates"]["conv2"]["gate_rate"][0].mean()
    np.testing.assert_allclose(rate, spec.threshold.target, rtol=1e-5)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.0}, "`macs` .*in \\(0, 1\\]"),
        ({"macs": 1.5}, "`macs` .*in \\(0, 1\\]"),
        ({"macs": float("nan")}, "`macs` .*in \\(0, 1\\]"),
        ({"layers": "layer9*"}, "'layer9\\*'.* matches no convolution"),
        ({"layers": "fc*"}, "matches no convolution"),
        ({"tile_size": 1}, "`tile_size` .*>= 2"),
        ({"calibration": np.ones((28, 28, 1))}, "`calibration` .*\\[n, h, w, c\\]"),
        ({"calibration": np.ones((0, 28, 28, 1))}, "`calibration` .*n >= 1"),
        ({"metric": "l3"}, "`metric`"),
        ({"calibration": np.full((2, 28, 28, 1), np.nan)}, "must be finite"),
    ],
)
def test_bad_arguments_are_refused(lenet, options, message):
    arguments = {"macs": 0.5, "calibration": np.ones((2, 28, 28, 1)), **options}
    with pytest.raises(ValueError, match=message):
        ij.make_inertial(*lenet, **arguments)


@pytest.mark.slow
def test_networks_that_cannot_be_made_inertial_are_refused(lenet):
    model, variables = lenet
    images = np.ones((2, 28, 28, 1))
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), dict(variables))
    with pytest.raises(ValueError, match="must be finite"):
        ij.make_inertial(model, broken, macs=0.5, calibration=images)
    plan = ij.Plan((("conv2", ij.Inertial(3, 4)),))
    with pytest.raises(ValueError, match="inertial layers already"):
        ij.make_inertial(
            model.clone(plan=plan), variables, macs=0.5, calibration=images
        )
    dense = nn.Dense(3)
    with pytest.raises(ValueError, match="`layers` .*matches no convolution"):
        ij.make_inertial(
            dense, dense.init(jax.random.key(0), images), macs=0.5, calibration=images
        )


def test_thresholds_of_the_models_own_layers_stay():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = ij.InertialConv(4, 3, reading="tiled", name="own")(x)
            return nn.Conv(4, (3, 3), name="plain")(x).mean((1, 2))

    images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    model = Net()
    variables = model.init(jax.random.key(0), images)
    own = {"own": {"threshold": jnp.float32(0.7)}}
    given = {**variables, "thresholds": own}
    inertial, changed = ij.make_inertial(model, given, macs=0.95, calibration=images)
    assert sorted(changed["thresholds"]) == ["own", "plain"]
    assert changed["thresholds"]["own"] == own["own"]
    # With its tiles open, the new layer computes what the plain one did.
    opened = {**own, "plain": {"threshold": jnp.float32(-1)}}
    np.testing.assert_allclose(
        inertial.apply({**changed, "thresholds": opened}, images),
        model.apply(given, images),
        atol=1e-5,
    )


def test_a_network_with_an_inertial_core_is_inertial_already():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))])
    core = ij.Inertial(3, 4, reading="tiled")
    planned = ij.Planned(model, ij.Plan((("layers_0", ij.Tucker2(2, 3, core=core)),)))
    images = np.ones((8, 8, 8, 3), np.float32)
    variables = planned.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="has inertial layers already: 'layers_0'"):
        ij.make_inertial(planned, variables, macs=0.9, calibration=images)
