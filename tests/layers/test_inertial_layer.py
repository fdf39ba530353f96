"""The inertial layer: its operation, its variables, and when they move."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax import lax

import inertia_jax as ij
from inertia_jax import ops
from train.machine.parallel import AXIS, Parallel

pytestmark = pytest.mark.usefixtures("optimised")
WINDOW = {"core_size": 2, "region_size": 4}
TILED = {"core_size": 3, "region_size": 4, "reading": "tiled"}
READINGS = pytest.mark.parametrize("reading", [WINDOW, TILED], ids=["window", "tiled"])


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def randomised(variables, seed=1):
    """Every parameter drawn, since the first weights are all alike."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype)  # noqa: E731
    return {**variables, "params": jax.tree.map(draw, dict(variables["params"]))}


def init(layer, x):
    return randomised(jax.jit(layer.init)(jax.random.key(0), x))


@partial(jax.jit, static_argnums=0)
def train_step(layer, variables, x):
    """Returns output, what was sown, and the variables after one training step."""
    mutable = ["batch_stats", "thresholds", "intermediates"]
    y, moved = layer.apply(variables, x, train=True, mutable=mutable)
    sown = {name: value[0] for name, value in moved.pop("intermediates").items()}
    return y, sown, {**variables, **moved}


@partial(jax.jit, static_argnums=0)
def evaluate(layer, variables, x):
    """Returns output and what was sown."""
    y, sown = layer.apply(variables, x, mutable=["intermediates"])
    return y, {name: value[0] for name, value in sown["intermediates"].items()}


def raw_friction(layer, x):
    _, sown = evaluate(layer.clone(relative=False), init(layer, x), x)
    return np.asarray(sown["friction"])


# The operation


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        *(
            {**WINDOW, "combine": name, "strides": (2, 1)}
            for name in ("mean", "sum", "max", "stack", "weighted")
        ),
        {**WINDOW, "combine": "weighted_channel", "padding": ((1, 2), (0, 1))},
        {**WINDOW, "combine": "weighted_input", "metric": "l2"},
        {**WINDOW, "combine": "weighted", "zero_middle": True},
        {**WINDOW, "combine": "weighted_periphery", "strides": 2},
        {**WINDOW, "channel_stride": 2, "reference": "core_mean"},
        {**TILED, "low": "mean"},
        {**TILED, "low": "sample", "capacities": (0.7, 1)},
        {**TILED, "padding": "VALID", "capacities": None},
    ],
    ids=lambda o: "-".join(str(v) for k, v in o.items() if not k.endswith("size")),
)
def test_a_layer_is_its_operation_with_its_variables(options):
    layer = ij.InertialConv(6, threshold=ij.Fixed(0.8), **options)
    x = normal(2, 3, 9, 8, 3)
    variables = init(layer, x)
    params, settings = variables["params"], dict(options)
    weights = params.get("weights")
    if settings.pop("zero_middle", False):
        weights = weights.at[1, 1].set(0)
    m = settings.pop("core_size")
    operation = ops.inertial_conv
    if settings.pop("reading", "window") == "tiled":
        operation = ops.inertial_conv_tiled
    else:
        settings["weights"] = weights
    assert params["kernel"].shape == (m, m, 3, 3 if "stack" in options.values() else 6)
    flat = x.reshape(6, 9, 8, 3)
    apply = jax.jit(partial(operation, threshold=0.8, **settings))
    output = apply(flat, params["kernel"])
    assert 0 < output.gate.mean() < 1
    expected = output.y + params["bias"].reshape(1, 1, 1, -1)
    y, sown = evaluate(layer, variables, x)
    # The same operation in the same type: nothing but fusion may differ.
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5)  # noqa: E731
    close(y, expected.reshape(2, 3, *expected.shape[1:]))
    close(evaluate(layer, variables, flat[4])[0], expected[4])
    close(sown["gate_rate"], output.gate.reshape(6, -1).mean(1))


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_variables():
    layer = ij.InertialConv(4, **TILED, dtype=jnp.bfloat16, threshold=ij.Learned(0.5))
    x = normal(2, 6, 6, 3)
    variables = init(layer, x)
    assert evaluate(layer, variables, x)[0].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}


# Variables


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": ij.Fixed(0.3)}, {"thresholds/threshold": 0.3}),
        ({"threshold": ij.Rate(0.3)}, {"thresholds/threshold": 0.0}),
        ({"threshold": ij.Learned(0.3)}, {"params/threshold": 0.3}),
        (
            {"threshold": ij.Learned(0.3, per_channel=True)},
            {"params/threshold": [0.3] * 4},
        ),
        (
            {"threshold": ij.Learned(0.3), "relative": True},
            {"params/threshold": 0.3, "batch_stats/friction_mean": 1.0},
        ),
    ],
    ids=lambda o: "-".join(map(str, o)),
)
def test_variables_lie_in_their_collections(options, expected):
    layer = ij.InertialConv(4, **WINDOW, **options)
    start = jax.jit(partial(layer.init, train=True))
    variables = start(jax.random.key(0), normal(2, 6, 6, 3))
    flat = traverse_util.flatten_dict(variables, sep="/")
    assert flat.keys() == {"params/kernel", "params/bias", *expected}
    for path, value in expected.items():
        np.testing.assert_array_equal(flat[path], np.float32(value))


@pytest.mark.slow
@READINGS
def test_rate_opens_its_share_and_keeps_the_running_mean(reading):
    layer = ij.InertialConv(4, **reading, threshold=ij.Rate(0.3))
    variables = init(layer, normal(4, 8, 8, 3))
    stored = 0.0
    for seed in range(2):
        x = normal(4, 8, 8, 3, seed=seed)
        frictions = np.sort(raw_friction(layer, x), axis=None)
        _, sown, variables = train_step(layer, variables, x)
        num_open = math.floor(0.3 * frictions.size)
        assert round(float(sown["gate_rate"].mean()) * frictions.size) == num_open
        stored = 0.9 * stored + 0.1 * frictions[-num_open - 1]
        moved = variables["thresholds"]["threshold"]
        np.testing.assert_allclose(moved, stored, rtol=1e-6)
    _, sown = evaluate(layer, variables, x)
    expected = (frictions > stored).mean()
    np.testing.assert_allclose(sown["gate_rate"].mean(), expected, rtol=1e-6)


@pytest.mark.slow
@READINGS
def test_rate_1_opens_every_gate(reading):
    layer = ij.InertialConv(4, **reading, threshold=ij.Rate(1.0))
    x = np.zeros((2, 8, 8, 3), np.float32)  # no friction anywhere
    _, sown, variables = train_step(layer, init(layer, x), x)
    assert sown["gate_rate"].mean() == 1
    assert evaluate(layer, variables, x)[1]["gate_rate"].mean() == 1


@pytest.mark.slow
def test_relative_friction_is_divided_by_its_mean():
    layer = ij.InertialConv(4, **WINDOW, relative=True)
    x = normal(4, 8, 8, 3)
    raw = raw_friction(layer, x)
    _, sown, variables = train_step(layer, init(layer, x), x)
    np.testing.assert_allclose(sown["friction"], raw / raw.mean(), rtol=1e-5)
    running = 0.9 + 0.1 * raw.mean()
    moved = variables["batch_stats"]["friction_mean"]
    np.testing.assert_allclose(moved, running, rtol=1e-6)
    _, sown = evaluate(layer, variables, x)
    np.testing.assert_allclose(sown["friction"], raw / running, rtol=1e-5)
    _, sown, _ = train_step(layer.clone(padding="VALID"), variables, np.ones_like(x))
    np.testing.assert_array_equal(sown["friction"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("gate_gradient", ["none", "ste"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gate_rate_has_the_straight_through_gradient(gate_gradient, per_channel):
    layer = ij.InertialConv(
        4,
        **WINDOW,
        threshold=ij.Learned(0.8, per_channel=per_channel),
        gate_gradient=gate_gradient,
        slope=3.0,
    )
    x = normal(2, 6, 6, 3)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    mean_rate = lambda p: evaluate(layer, {"params": p}, x)[1]["gate_rate"].mean()  # noqa: E731
    gradient = jax.grad(mean_rate)(params)["threshold"]
    soft = 1 / (1 + np.exp(-3 * (raw_friction(layer, x) - 0.8)))
    expected = -(3 * soft * (1 - soft)).mean() * (gate_gradient == "ste")
    expected = np.full(4, expected / 4) if per_channel else expected
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.slow
def test_another_threshold_does_not_compile_anew():
    layer = ij.InertialConv(4, **TILED)
    x = normal(2, 8, 8, 3)
    variables, traces = init(layer, x), []

    @jax.jit
    def apply(variables):
        traces.append(1)
        return layer.apply(variables, x)

    ends = [
        apply({**variables, "thresholds": {"threshold": jnp.float32(value)}})
        for value in (-1, 1e9)
    ]
    assert len(traces) == 1
    assert not np.allclose(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
@READINGS
def test_eight_devices_look_at_all_frictions(reading, parallel, x64):
    layer = ij.InertialConv(
        4, **reading, threshold=ij.Rate(0.3), relative=True, param_dtype=jnp.float64
    )
    # Images unlike each other: each device's own share and mean would differ.
    x = normal(16, 8, 8, 3, dtype=np.float64) * np.arange(1, 17).reshape(-1, 1, 1, 1)
    variables = init(layer, x)
    y, sown, moved = train_step(layer, variables, x)

    def per_device(variables, x):
        y, sown, moved = train_step(layer.clone(axis_name=AXIS), variables, x)
        return lax.all_gather((y, sown), AXIS, tiled=True), moved

    call = Parallel(parallel, tuple(jax.devices())).wrap(per_device, (False, True))
    result = call(variables, x.reshape(8, 2, 8, 8, 3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-12),
        result,
        ((y, sown), moved),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**TILED, "strides": 2}, "`strides` .*must be 1"),
        ({**TILED, "strides": (1, 2)}, "`strides` .*must be 1"),
        ({**WINDOW, "strides": 0}, "`strides` .*integers >= 1"),
        ({**WINDOW, "combine": "stack"}, "`features` .*must be even"),
        ({**TILED, "threshold": ij.Learned(per_channel=True)}, "`per_channel`"),
        ({**TILED, "combine": "max"}, "`combine` .*tiled reading"),
        ({**WINDOW, "low": "sample"}, "`low` .*window reading"),
        ({**WINDOW, "zero_middle": True}, "`zero_middle`"),
        ({**TILED, "capacities": (0.5, 0.25, 1)}, "`capacities`"),
        ({**TILED, "capacities": (0.5,)}, "`capacities`"),
        ({**TILED, "capacities": (0.0, 1)}, "`capacities`"),
        ({**TILED, "capacities": ()}, "`capacities`"),
        ({"core_size": 3, "region_size": 3}, "`region_size`"),
        ({**WINDOW, "gate_gradient": "sigmoid"}, "`gate_gradient`"),
    ],
)
def test_bad_settings_are_refused(options, message):
    layer = ij.InertialConv(5, **options)
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), normal(1, 6, 6, 3))


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`target` .*must be > 0"):
        ij.Rate(0)


@pytest.mark.slow
def test_it_reads_as_the_ordinary_convolution_does():
    window, tiled = ij.InertialConv(4, (3, 3)), ij.InertialConv(4, 3, reading="tiled")
    assert (window.core_size, window.region_size) == (3, 5)
    assert (tiled.core_size, tiled.region_size) == (3, 4)
    assert ij.InertialConv(features=4, kernel_size=(3, 3)) == window
    assert ij.InertialConv(4, 3, 5) == window == window.clone()
    assert ij.InertialConv(4, core_size=1, region_size=3).region_size == 3
    # With every gate open the tiled reading is the ordinary convolution.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
    layer = tiled.clone(threshold=ij.Fixed.OPEN)
    variables = layer.init(jax.random.key(0), x)
    plain = nn.Conv(4, (3, 3)).apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(layer.apply(variables, x), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((4,), {}, r"`core_size` \(=None\) or `kernel_size` .* InertialConv\(feat"),
        ((4, 3), {"kernel_size": 3}, r"either `core_size` \(=3\) or `kernel_size`"),
        ((4, (3, 5)), {}, r"`core_size` \(=\(3, 5\)\) must be square"),
        ((4, (3, 3), (2, 2)), {}, r"`region_size` \(=\(2, 2\)\) .*strides .*by name"),
        ((4, "SAME"), {}, r"`core_size` \(='SAME'\) must be"),
    ],
)
def test_a_call_that_is_not_that_of_a_layer_shows_the_right_one(args, options, message):
    with pytest.raises(ValueError, match=message):
        ij.InertialConv(*args, **options)


@pytest.mark.slow
def test_a_layer_is_a_field_of_other_modules():
    x = np.ones((1, 6, 6, 2), np.float32)
    for layer in (ij.InertialConv(3, (3, 3)), ij.InertialConv(3, 3, 4)):
        network = nn.Sequential([layer])
        variables = network.init(jax.random.key(0), x)
        alone = {name: tree["layers_0"] for name, tree in variables.items()}
        np.testing.assert_array_equal(
            network.apply(variables, x), layer.apply(alone, x)
        )
