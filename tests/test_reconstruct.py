"""Kernels of compressed networks fitted to what the dense layers put out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
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


class Alone(nn.Module):
    """A network of one inertial layer, or of the dense one."""

    inertial: bool

    @nn.compact
    def __call__(self, x):
        if not self.inertial:
            return nn.Conv(3, (3, 3), name="conv")(x)
        return ij.InertialConv(
            3, 3, 4, reading="tiled", threshold=ij.Fixed(0.5), name="conv"
        )(x)


def test_an_inertial_layer_becomes_the_least_squares_solution():
    x = smooth(6, 8, 8, 2)
    # Those held out are those fitted to: no step is dropped.
    images = np.tile(x, (4, 1, 1, 1))
    dense, inertial = Alone(inertial=False), Alone(inertial=True)
    known = dense.init(KEY, x)
    start = inertial.init(jax.random.key(1), x)
    rate = inertial.apply(start, x, mutable="intermediates")[1]
    (opened,) = rate["intermediates"]["conv"]["gate_rate"]
    assert 0.2 < opened.mean() < 0.8
    fitted = ij.reconstruct(
        inertial,
        start,
        dense=(dense, known),
        images=images,
        iterations=60,
        batch_size=3,
    )
    names = ("conv/kernel", "conv/bias")
    matrix = columns(inertial, start, x, names)
    target = np.asarray(dense.apply(known, x), np.float64).ravel()
    solution, residual, rank, _ = np.linalg.lstsq(matrix, target)
    assert rank == matrix.shape[1]
    assert residual > 1  # closed tiles: no kernel does what the dense one did
    found = np.concatenate([np.asarray(flat(fitted)[name]).ravel() for name in names])
    np.testing.assert_allclose(found, solution, atol=1e-3 * np.abs(solution).max())
    jax.tree.map(
        np.testing.assert_array_equal, fitted["thresholds"], start["thresholds"]
    )


def test_the_last_factor_becomes_the_least_squares_solution(two_convs):
    dense, (model, start) = two_convs
    x = smooth(8, 8, 8, 4)
    images = np.tile(x, (4, 1, 1, 1))
    fitted = ij.reconstruct(
        model, start, dense=dense, images=images, layers="grouped", iterations=40
    )
    before, after = flat(start), flat(fitted)
    for name in ("same/u_in/kernel", "same/core/kernel", "same/u_out/bias"):
        np.testing.assert_array_equal(after[name], before[name])
    names = ("grouped/u_out/kernel", "grouped/u_out/bias")
    matrix = columns(model, fitted, x, names)
    target = np.asarray(dense[0].apply(dense[1], x), np.float64).ravel()
    solution = np.linalg.lstsq(matrix, target)[0]
    found = np.concatenate([np.asarray(after[name]).ravel() for name in names])
    np.testing.assert_allclose(found, solution, atol=2e-3 * np.abs(solution).max())


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


def test_steps_that_do_no_good_elsewhere_are_dropped(two_convs):
    dense, compressed = two_convs
    # What is held out has other outputs than anything the first three teach.
    images = np.concatenate([smooth(3, 8, 8, 4), 50 * smooth(1, 8, 8, 4, seed=2)])
    fitted = ij.reconstruct(*compressed, dense=dense, images=images, iterations=30)
    before, after = error(dense, compressed, images[3:], compressed[1], fitted)
    assert after <= before


def test_a_network_that_lost_nothing_stays_bit_for_bit(two_convs):
    dense, _ = two_convs
    same = ij.reconstruct(*dense, dense=dense, images=noise(4, 8, 8, 4))
    jax.tree.map(np.testing.assert_array_equal, same, dense[1])


def test_types_of_parameters_are_kept(two_convs):
    dense, compressed = two_convs
    model = ij.Planned(TwoConvs(dtype=jnp.bfloat16), compressed[0].plan)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), compressed[1])
    x = smooth(16, 8, 8, 4)
    fitted = ij.reconstruct(model, halves, dense=dense, images=x)
    assert {leaf.dtype for leaf in jax.tree.leaves(fitted)} == {jnp.dtype("bfloat16")}
    before, after = error(dense, (model, None), x, halves, fitted)
    assert after < 0.9 * before


@pytest.fixture(scope="module")
def resnet():
    model = CifarResNet(depth=8, width=0.5, shortcut="B")
    return model, ij.init_variables(model, KEY)


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
    x = noise(4, 8, 8, 4)
    for change, message in (
        ({"layers": "nothing*"}, "matches no convolution"),
        ({"iterations": 0}, r"`iterations` \(=0\)"),
        ({"batch_size": 0}, r"`batch_size` \(=0\)"),
        ({"images": x * np.nan}, "`images` must be finite"),
        ({"images": x[:1]}, r"`images` \(=1\) must be at least 2"),
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
