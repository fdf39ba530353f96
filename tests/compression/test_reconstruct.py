"""Kernels of compressed networks fitted to what the dense layers put out."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from inertia_jax.compression.layer_fit import LayerIO, fit_part
from inertia_jax.models.resnet_cifar import CifarResNet

KEY = jax.random.key(0)


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def smooth(*shape, seed=1):
    """Noise whose neighbours are alike, as those of images are."""
    x = noise(*shape, seed=seed)
    return sum(np.roll(x, (i, j), (1, 2)) for i in range(3) for j in range(3)) / 5


def flat(variables):
    return traverse_util.flatten_dict(dict(variables["params"]), sep="/")


class TwoConvs(nn.Module):
    """Any Linen model: a layer called twice, then groups, dilation and strides."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        same = nn.Conv(4, (3, 3), dtype=self.dtype, name="same")
        x = nn.tanh(same(nn.tanh(same(x))))
        return nn.Conv(
            6,
            (3, 3),
            feature_group_count=2,
            kernel_dilation=2,
            strides=2,
            dtype=self.dtype,
            name="grouped",
        )(x)


@pytest.fixture(scope="module")
def two_convs():
    """The model, its variables, and both at a third of the MACs or so."""
    model = TwoConvs()
    variables = model.init(KEY, noise(1, 8, 8, 4))
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * noise(*leaf.shape), variables)
    plan = ij.Plan((("same", ij.Tucker2(3, 3)), ("grouped", ij.Tucker2(2, 2))))
    compressed = ij.compress(model, variables, ranks=plan, image_shape=(8, 8, 4))
    return (model, variables), compressed


def error(dense, compressed, x, *variables):
    """Mean square of the difference of outputs, for each of some variables."""
    (model, known), (small, _) = dense, compressed
    expected = np.asarray(jax.jit(model.apply)(known, x))
    found = [np.asarray(jax.jit(small.apply)(v, x)) for v in variables]
    return [np.square(y - expected).mean() for y in found]


def columns(layer, variables, x, names):
    """The matrix of a layer's output in some of its parameters, entry by entry."""
    params = {name: np.zeros_like(flat(variables)[name]) for name in names}
    zero = {**flat(variables), **params}
    found = []
    apply = jax.jit(layer.apply)
    for name in names:
        for index in np.ndindex(params[name].shape):
            ends = []
            for at in (zero[name], zero[name].copy()):
                if at is not zero[name]:
                    at[index] = 1
                tree = traverse_util.unflatten_dict({**zero, name: at}, sep="/")
                ends.append(apply({**variables, "params": tree}, x))
            found.append(np.asarray(ends[1] - ends[0], np.float64).ravel())
    return np.stack(found, -1)


TILED = {"reading": "tiled", "threshold": ij.Fixed(0.5)}
WINDOW = {"combine": "weighted", "threshold": ij.Fixed(0.4), "padding": "VALID"}
STACK = {**WINDOW, "combine": "stack"}
LAYERS = {
    "ordinary": (nn.Conv(4, (3, 3), strides=2), ""),
    "tiled": (ij.InertialConv(4, 3, 4, **TILED), ""),
    "sampled": (ij.InertialConv(4, 3, 4, low="sample", **TILED), ""),
    "window": (ij.InertialConv(4, 1, 3, **WINDOW), ""),
    "stack": (ij.InertialConv(4, 1, 3, use_bias=False, **STACK), ""),
    "u_in": (ij.Tucker2Conv(4, 3, 2, 3), "u_in"),
    "core": (ij.Tucker2Conv(4, (3, 2), 2, 3), "core"),
    "u_out": (ij.Tucker2Conv(4, 3, 2, 2, feature_group_count=2), "u_out"),
    "left": (ij.LowRankConv(4, 2, strides=2), "left"),
    "right": (ij.LowRankConv(4, 2), "right"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layer, part", LAYERS.values(), ids=list(LAYERS))
def test_a_part_becomes_the_least_squares_solution(layer, part):
    x = smooth(4, 8, 8, 6)
    variables = layer.init(KEY, x)
    # Biases are not 0, those that stay too.
    params = jax.tree.map(lambda w: w + 0.1 * noise(*w.shape), variables["params"])
    variables = {**variables, "params": params}
    start = flat(variables)
    target = noise(*layer.apply(variables, x).shape)
    seen = [LayerIO(jnp.asarray(x[i : i + 2]), target[i : i + 2]) for i in (0, 2)]
    others = {name: tree for name, tree in variables.items() if name != "params"}
    # What is held out is what it is fitted to: no step is dropped.
    fitted = fit_part(layer, others, start, part, seen, seen, 400)
    names = [f"{part}/{name}".lstrip("/") for name in ("kernel", "bias")]
    names = [name for name in names if name in start]
    assert {n for n in start if fitted[n] is not start[n]} == set(names)

    matrix = columns(layer, variables, x, names)
    zero = {**start, **{name: 0 * start[name] for name in names}}
    zero = {**variables, "params": traverse_util.unflatten_dict(zero, sep="/")}
    offset = np.asarray(layer.apply(zero, x), np.float64)
    solution = np.linalg.lstsq(matrix, (target - offset).ravel())[0]
    found = np.concatenate([np.asarray(fitted[name]).ravel() for name in names])
    # Of kernels that do the same, CG keeps nearest to its start: outputs are compared.
    expected = matrix @ solution
    np.testing.assert_allclose(
        matrix @ found, expected, atol=5e-3 * np.abs(expected).max()
    )


@pytest.mark.slow
def test_gates_are_those_of_the_network():
    """A closed tile of `low="sample"` is wrong in another way than an open one."""
    x = np.tile(smooth(6, 8, 8, 2), (4, 1, 1, 1))
    dense = nn.Sequential([nn.Conv(3, (3, 3))])
    layer = ij.InertialConv(
        3, 3, 4, reading="tiled", low="sample", threshold=ij.Fixed(0.5)
    )
    model = nn.Sequential([layer])
    known, start = dense.init(KEY, x), model.init(jax.random.key(1), x)
    fitted = ij.reconstruct(
        model, start, dense=(dense, known), images=x, iterations=60, batch_size=6
    )
    names = ("layers_0/kernel", "layers_0/bias")
    target = np.asarray(dense.apply(known, x), np.float64).ravel()
    solution = np.linalg.lstsq(columns(model, start, x, names), target)[0]
    found = np.concatenate([np.asarray(flat(fitted)[name]).ravel() for name in names])
    np.testing.assert_allclose(found, solution, atol=1e-3 * np.abs(solution).max())
    unlike = np.abs(flat(fitted)[names[0]] - flat(known)[names[0]]).max()
    assert unlike > 0.02 * np.abs(flat(known)[names[0]]).max()
    jax.tree.map(
        np.testing.assert_array_equal, fitted["thresholds"], start["thresholds"]
    )


@pytest.mark.slow
def test_what_lies_before_is_made_up_for(two_convs):
    dense, compressed = two_convs
    fitting, other = smooth(128, 8, 8, 4), smooth(32, 8, 8, 4, seed=2)
    last = ij.reconstruct(
        *compressed, dense=dense, images=fitting, layers="grouped", iterations=20
    )
    every = ij.reconstruct(*compressed, dense=dense, images=fitting, iterations=20)
    start, only_last, whole = error(
        dense, compressed, other, compressed[1], last, every
    )
    # Of images that the kernels were not fitted to.
    assert whole < only_last < start
    assert whole < 0.9 * start


@pytest.mark.slow
def test_one_program_is_compiled_for_all_layers_unless_they_see_much(
    two_convs, monkeypatch
):
    dense, compressed = two_convs
    module = importlib.import_module("inertia_jax.compression.reconstruct")
    original, made = module._calls_of, []

    def calls_of(paths, model, *, which=None, **options):
        if which is not None:  # None asks for shapes alone
            made.append(paths)
        return original(paths, model, which=which, **options)

    monkeypatch.setattr(module, "_calls_of", calls_of)
    options = {"dense": dense, "images": smooth(16, 8, 8, 4), "iterations": 3}
    together = ij.reconstruct(*compressed, **options)
    assert made == [("same", "grouped")] * 2
    made.clear()
    monkeypatch.setattr(module, "_PROGRAM_BYTES", 1)
    apart = ij.reconstruct(*compressed, **options)
    assert made == [("same",), ("same",), ("grouped",), ("grouped",)]
    for name, leaf in flat(together).items():
        np.testing.assert_allclose(flat(apart)[name], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_steps_that_do_no_good_elsewhere_are_dropped(two_convs):
    dense, compressed = two_convs
    # What is held out has other outputs than anything the first three teach.
    images = np.concatenate([smooth(6, 8, 8, 4), 50 * smooth(2, 8, 8, 4, seed=2)])
    fitted = ij.reconstruct(*compressed, dense=dense, images=images, iterations=30)
    before, after = error(dense, compressed, images[6:], compressed[1], fitted)
    assert after <= before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_network_that_lost_nothing_stays_bit_for_bit(two_convs, dtype):
    dense = TwoConvs(dtype=dtype), two_convs[0][1]
    same = ij.reconstruct(*dense, dense=dense, images=noise(8, 8, 8, 4))
    jax.tree.map(np.testing.assert_array_equal, same, dense[1])


@pytest.mark.slow
def test_an_inertial_network_is_its_own_target(resnet):
    """Batches move no threshold, neither in the one nor in the other."""
    spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5))
    model = resnet[0].clone(plan=ij.Plan((("layer1_0/conv2", spec),)))
    gates = {"layer1_0": {"conv2": {"threshold": jnp.float32(0.3)}}}
    network = model, {**resnet[1], "thresholds": gates}
    same = ij.reconstruct(*network, dense=network, images=smooth(8, 16, 16, 3))
    jax.tree.map(np.testing.assert_array_equal, same, network[1])


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
def test_narrow_kernels_are_fitted_as_their_float32_copy(two_convs, narrow):
    dense, compressed = two_convs
    halves = jax.tree.map(lambda leaf: leaf.astype(narrow), compressed[1])
    copy = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves)
    x = smooth(16, 8, 8, 4)
    fitted, expected = (
        ij.reconstruct(compressed[0], variables, dense=dense, images=x)
        for variables in (halves, copy)
    )
    # A fitted kernel has bits that the narrow type has not.
    ours, theirs = flat(fitted), flat(expected)
    moved = {p for p in ours if np.any(flat(halves)[p] != ours[p])}
    assert "same/core/kernel" in moved
    assert {ours[path].dtype for path in moved} == {jnp.dtype("float32")}
    for path in ours:
        # Compiled apart, since the types of what is not fitted differ.
        np.testing.assert_allclose(
            np.asarray(ours[path], np.float32), theirs[path], atol=1e-5
        )


@pytest.mark.slow
def test_a_network_that_computes_in_bfloat16_is_fitted(two_convs):
    dense, compressed = two_convs
    model = ij.Planned(TwoConvs(dtype=jnp.bfloat16), compressed[0].plan)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), compressed[1])
    x = smooth(16, 8, 8, 4)
    fitted = ij.reconstruct(model, halves, dense=dense, images=x)
    before, after = error(dense, (model, None), x, halves, fitted)
    assert after < 0.9 * before


@pytest.fixture(scope="module")
def resnet():
    model = CifarResNet(depth=8, width=0.5, shortcut="B")
    return model, ij.init_variables(model, KEY)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tucker2", "inertial", "both"])
def test_outputs_of_a_network_come_nearer(resnet, method):
    images, other = smooth(128, 16, 16, 3), smooth(32, 16, 16, 3, seed=2)
    if method == "tucker2":
        compressed = ij.compress(*resnet, ranks=ij.Ratio(0.6), image_shape=(16, 16, 3))
    elif method == "inertial":
        spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5))
        gates = {"layer1_0": {"conv2": {"threshold": jnp.float32(0.7)}}}
        model = resnet[0].clone(plan=ij.Plan((("layer1_0/conv2", spec),)))
        compressed = model, {**resnet[1], "thresholds": gates}
    else:
        core = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5))
        plan = ij.Plan((("layer1*conv1", ij.Tucker2(4, 4, core=core)),))
        model = resnet[0].clone(plan=plan)
        # Factors of the ordinary kernel, around gates.
        ordinary = ij.Plan((("layer1*conv1", ij.Tucker2(4, 4)),))
        _, factors = ij.compress(*resnet, ranks=ordinary, image_shape=(16, 16, 3))
        gates = {"layer1_0": {"conv1": {"core": {"threshold": jnp.float32(0.8)}}}}
        compressed = model, {**factors, "thresholds": gates}
    model, start = compressed
    fitted = ij.reconstruct(
        model, start, dense=resnet, images=images, iterations=6, batch_size=32
    )
    still = model.clone(plan=model.plan.with_fixed_thresholds().without_ladders())

    def logits(model, variables):
        stats = ij.recalibrate_batch_norm(model, variables, images, batch_size=32)
        return np.asarray(jax.jit(lambda v: model.apply(v, other))(stats))

    expected = logits(*resnet)
    before, after = (
        np.square(logits(still, v) - expected).mean() for v in (start, fitted)
    )
    assert after < 0.98 * before
    fixed = ("bn", "linear", "downsample/1")
    for name, leaf in flat(start).items():
        if any(word in name for word in fixed):
            np.testing.assert_array_equal(flat(fitted)[name], leaf)
    # Friction is that of what `u_in` puts out, and would move the gates.
    name = "layer1_0/conv1/u_in/kernel"
    moved = not np.array_equal(flat(fitted).get(name), flat(start).get(name))
    assert moved == (method == "tucker2")
    for collection in start.keys() - {"params"}:
        jax.tree.map(
            np.testing.assert_array_equal, fitted[collection], start[collection]
        )


def test_learned_and_measured_thresholds_hold_still():
    plan = ij.Plan(
        (
            ("a", ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5))),
            (
                "b",
                ij.Tucker2(2, 2, core=ij.Inertial(3, 4, threshold=ij.Learned(0.3))),
            ),
            ("c", ij.Conv()),
        )
    )
    found = plan.with_fixed_thresholds()
    assert isinstance(found.rules[0][1].threshold, ij.Fixed)
    assert found.rules[1:] == plan.rules[1:]
    assert found.rules[0][1].region_size == 4


def test_bad_input(two_convs):
    dense, compressed = two_convs
    x = noise(8, 8, 8, 4)
    for change, message in (
        ({"layers": "nothing*"}, "matches no convolution"),
        ({"iterations": 0}, r"`iterations` \(=0\)"),
        ({"batch_size": 1}, r"`batch_size` \(=1\) must be >= 2"),
        ({"images": x * np.nan}, "`images` must be finite"),
        ({"images": x[:7]}, r"`images` \(=7\) must be at least 8"),
    ):
        options = {"dense": dense, "images": x, **change}
        with pytest.raises(ValueError, match=message):
            ij.reconstruct(*compressed, **options)
    broken = jax.tree.map(lambda leaf: leaf * jnp.inf, dense[1])
    with pytest.raises(ValueError, match="of 'same' must be finite"):
        ij.reconstruct(*compressed, dense=(dense[0], broken), images=x)
    other = nn.Sequential([nn.Conv(4, (3, 3))])
    wrong = other, other.init(KEY, x)
    with pytest.raises(ValueError, match=r"`dense` puts out \[\] at 'same'"):
        ij.reconstruct(*compressed, dense=wrong, images=x)


def test_folded_networks_are_no_targets(resnet):
    folded = ij.fold_batch_norm(*resnet)
    with pytest.raises(ValueError, match="`dense` must have BatchNorm where"):
        ij.reconstruct(*folded, dense=resnet, images=noise(8, 16, 16, 3))


class Mixed(nn.Module):
    """A plain layer, one whose kernel is centred, one whose kernel is read, and so on.

    The layer `own` convolves by a function of its own.
    """

    @nn.compact
    def __call__(self, x):
        centre = lambda tree: jax.tree.map(lambda k: k - k.mean(), tree)  # noqa: E731
        centred = nn.map_variables(nn.Conv, "params", centre, init=True)
        x = nn.Conv(4, (3, 3), name="plain")(x)
        x = centred(4, (3, 3), use_bias=False, name="centred")(nn.relu(x))
        tied = nn.Conv(4, (1, 1), name="tied")
        x = nn.relu(tied(x)) @ tied.variables["params"]["kernel"][0, 0].T
        x = nn.Conv(4, (3, 3), conv_general_dilated=by_square, name="own")(x)
        return nn.Conv(4, (3, 3), name="last")(x)


def by_square(x, kernel, *args, **options):
    return jax.lax.conv_general_dilated(x, kernel**2, *args, **options)


@pytest.mark.slow
def test_layers_whose_parameters_are_transformed_or_read_elsewhere_stay():
    x = noise(32, 8, 8, 4)
    dense = Mixed(), Mixed().init(KEY, x)
    plan = ij.Plan((("plain", ij.Tucker2(1, 1)),))
    small = ij.compress(*dense, ranks=plan, image_shape=(8, 8, 4))
    fitted = ij.reconstruct(*small, dense=dense, images=x)
    before, after = flat(small[1]), flat(fitted)
    names = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.split("/")[0] for name in names} == {"plain", "last"}
    first, last = error(dense, small, x, small[1], fitted)
    assert last < first
    with pytest.raises(ValueError, match="matches no convolution that can be fitted"):
        ij.reconstruct(*small, dense=dense, images=x, layers="tied")


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(TwoConvs)(name="block")(nn.Conv(4, (1, 1), name="first")(x))


class Looped(nn.Module):
    """A layer that is called twice in a loop."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda conv, x, _: (conv(x), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=2,
        )
        x = nn.Conv(4, (3, 3), name="first")(x)
        return scan(nn.Conv(4, (3, 3), name="again"), x, None)[0]


@pytest.mark.slow
def test_layers_that_are_computed_again_are_seen_and_those_in_loops_are_not():
    x = noise(8, 8, 8, 4)
    model = Lifted()
    dense = model, model.init(KEY, x)
    same = ij.reconstruct(*dense, dense=dense, images=x)
    jax.tree.map(np.testing.assert_array_equal, same, dense[1])
    small, factors = ij.compress(*dense, ranks=ij.Ratio(0.5), calibration=x)
    assert small.plan.spec("block/same") != ij.Conv() and not small.kept
    fitted = ij.reconstruct(small, factors, dense=dense, images=x, iterations=2)
    error = lambda values: np.abs(small.apply(values, x) - model.apply(dense[1], x))  # noqa: E731
    assert error(fitted).mean() < error(factors).mean()

    model = Looped()
    dense = model, model.init(KEY, x)
    with pytest.raises(ValueError, match="'again' is called inside nn.scan"):
        ij.reconstruct(*dense, dense=dense, images=x)
    small, _ = ij.compress(*dense, ranks=ij.Ratio(0.5), calibration=x)
    assert "inside nn.scan" in dict(small.kept)["again"]
    assert small.plan.spec("first") != ij.Conv()
