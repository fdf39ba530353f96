"""Friction, gates and both readings of inertial convolution, beside plain loops."""

import itertools
import math
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from inertia_jax import ops

PLAIN = ("mean", "sum", "max", "stack")
COMBINES = (*PLAIN, "weighted", "weighted_channel", "weighted_input")
METRICS = ("l1", "l2", "max")
LADDERS = [(1 / 8, 1 / 4, 1 / 2, 1), (0.4, 1), (1,)]


def close(actual, expected, rtol=1e-10, atol=1e-12):
    """In float64, where only the order of summation differs, unless told otherwise."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol
        )


# The definitions in NumPy, region by region.


def zero_pad(x, padding, side, strides):
    if padding == "SAME":  # ceil(size / stride) windows, the odd zero after
        zeros = [
            max((math.ceil(size / stride) - 1) * stride + side - size, 0)
            for size, stride in zip(x.shape[1:3], strides, strict=True)
        ]
        padding = [(zero // 2, zero - zero // 2) for zero in zeros]
    if isinstance(padding, int):
        padding = [(padding, padding)] * 2
    pads = [(0, 0)] * 2 if padding == "VALID" else padding
    x = np.pad(x, ((0, 0), *((max(a, 0), max(b, 0)) for a, b in pads), (0, 0)))
    rows, columns = (slice(max(-a, 0), min(b, 0) or None) for a, b in pads)
    return x[:, rows, columns]


def windows(x, side, strides=(1, 1)):
    """Yields (image, row, column), and the window there."""
    for at in np.ndindex(
        len(x),
        (x.shape[1] - side) // strides[0] + 1,
        (x.shape[2] - side) // strides[1] + 1,
    ):
        i, j = at[1] * strides[0], at[2] * strides[1]
        yield at, x[at[0], i : i + side, j : j + side]


def gather(entries):
    """Returns the array whose (index, value) pairs these are, in order."""
    places, values = zip(*entries, strict=True)
    return np.stack(values).reshape(*np.add(places[-1], 1), *np.shape(values[0]))


def region_friction(region, m, metric="l1", reference="center", channel_stride=1):
    d, region = len(region), region[..., ::channel_stride]
    patch = range((d - m) // 2, (d - m) // 2 + m)
    r = region[d // 2, d // 2]
    if reference == "core_mean":
        r = np.mean([region[i, j] for i in patch for j in patch], axis=0)
    periphery = [
        region[i, j] - r for i, j in np.ndindex(d, d) if not (i in patch and j in patch)
    ]
    if metric == "l2":
        return np.mean(np.square(periphery))
    pixels = [np.mean(np.abs(difference)) for difference in periphery]
    return np.max(pixels) if metric == "max" else np.mean(pixels)


def friction_of(padded, d, m, strides=(1, 1), **settings):
    return gather(
        (at, region_friction(region, m, **settings))
        for at, region in windows(padded, d, strides)
    )


def window_reading(padded, core, gate, d, strides, combine="mean", weights=None):
    def one(region, gate):
        m, u = len(core), {}
        for i, j in np.ndindex(d - m + 1, d - m + 1):
            u[i, j] = np.tensordot(region[i : i + m, j : j + m], core, 3)
        low = u[(d - m) // 2, (d - m) // 2]
        if combine == "stack":
            return np.concatenate([low, gate * np.mean(list(u.values()), axis=0)])
        for i, j in u:
            if combine == "weighted_input":
                patch = region[i : i + m, j : j + m] * weights[i, j]
                u[i, j] = np.tensordot(patch, core, 3)
            elif weights is not None:
                u[i, j] = u[i, j] * weights[i, j]
        join = {"mean": np.mean, "max": np.max}.get(combine, np.sum)
        return np.where(gate, join(list(u.values()), axis=0), low)

    return gather((at, one(r, gate[at])) for at, r in windows(padded, d, strides))


def tiled_reading(padded, core, gate, n, low="mean"):
    high = gather(
        (at, np.tensordot(patch, core, 3)) for at, patch in windows(padded, len(core))
    )
    y = high.copy()
    for image, i, j in np.ndindex(*gate.shape):
        tile = np.s_[image, i * n : i * n + n, j * n : j * n + n]
        sample = high[tile][(n - 1) // 2, (n - 1) // 2]
        if not gate[image, i, j]:
            y[tile] = sample if low == "sample" else high[tile].mean((0, 1))
    return y


def tile_pad(x, padding, m, n):
    """Zero padding of the m x m convolution, filled right and below to whole tiles."""
    x = zero_pad(x, padding, m, (1, 1))
    rows, columns = (size - m + 1 for size in x.shape[1:3])
    fill = ((0, 0), (0, -rows % n), (0, -columns % n), (0, 0))
    return np.pad(x, fill), (rows, columns)


def between(values, share):
    """A threshold halfway between two frictions, so that rounding flips no gate."""
    values = np.unique(np.round(values, 9))
    i = min(int(share * len(values)), len(values) - 2)
    return (values[i] + values[i + 1]) / 2 if len(values) > 1 else values[0] / 2


def draw(seed):
    """Draws images, a core and what both readings' settings share."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 4))
    d = m + int(rng.integers(1, 4))
    n, h, w, c, o = rng.integers((1, 4, 4, 1, 1), (3, 10, 10, 5, 5))
    settings = dict(
        metric=METRICS[seed % 3],
        reference=("center", "core_mean")[rng.integers(2)],
        channel_stride=int(rng.integers(1, 3)),
    )
    x, core = rng.normal(size=(n, h, w, c)), rng.normal(size=(m, m, c, o))
    return rng, x, core, d, settings


def padding_that_holds(rng, x, side):
    paddings = ["SAME", "VALID", 1, ((2, 0), (1, 3)), ((0, 1), (-1, 2))]
    while True:
        padding = paddings[rng.integers(len(paddings))]
        padded = zero_pad(x, padding, side, (1, 1))
        if min(padded.shape[1:3]) >= side:
            return padding


def random_weights(rng, combine, n, core):
    last = {"weighted": (), "weighted_channel": core.shape[3:]}
    shape = (n, n, *last.get(combine, core.shape[2:3]))
    return None if combine in PLAIN else rng.normal(size=shape)


# Values


@pytest.mark.parametrize("seed", range(26))
def test_window_reading_equals_its_definition(seed, x64):
    rng, x, core, d, settings = draw(seed)
    combine, m = COMBINES[seed % 7], len(core)
    several = [2, 3, (1, 2), (3, 1), (2, 3)]
    # 26 seeds: each combine at stride 1 and at more.
    strides = several[rng.integers(5)] if seed // 7 % 2 else 1
    pair = (strides, strides) if isinstance(strides, int) else strides
    padding = padding_that_holds(rng, x, d)
    weights = random_weights(rng, combine, d - m + 1, core)
    padded = zero_pad(x, padding, d, pair)
    friction = friction_of(padded, d, m, pair, **settings)
    shape = core.shape[3:] if rng.integers(2) else ()
    threshold = np.vectorize(lambda share: between(friction, share))(rng.random(shape))
    gate = friction[..., None] > threshold.reshape(-1)
    y = window_reading(padded, core, gate, d, pair, combine, weights)

    settings.update(region_size=d, strides=strides, padding=padding)

    def op(x, core, threshold, weights):
        inputs = dict(threshold=threshold, combine=combine, weights=weights)
        return ops.inertial_conv(x, core, **inputs, **settings)

    output = jax.jit(op)(x, core, threshold, weights)
    close(output.friction, friction)
    close(output.y, y)
    np.testing.assert_array_equal(output.gate, gate if shape else gate[..., 0])
    if seed < 5:  # not everything twice: op by op compiles more
        close(ops.friction(x, core_size=m, **settings), friction)


@pytest.mark.parametrize("seed", range(20))
def test_tiled_reading_equals_its_definition(seed, x64):
    rng, x, core, d, settings = draw(seed)
    m, n, low = len(core), d - len(core) + 1, ("mean", "sample")[seed % 2]
    padding = padding_that_holds(rng, x, m)
    padded, (rows, columns) = tile_pad(x, padding, m, n)
    friction = friction_of(padded, d, m, (n, n), **settings)
    threshold = between(friction, rng.random())
    gate = friction > threshold
    y = tiled_reading(padded, core, gate, n, low)[:, :rows, :columns]

    settings.update(region_size=d, padding=padding, low=low)
    settings.update(capacities=[None, *LADDERS][rng.integers(4)])

    def op(x, core, threshold):
        return ops.inertial_conv_tiled(x, core, threshold=threshold, **settings)

    output = jax.jit(op)(x, core, threshold)
    close(output.friction, friction)
    close(output.y, y)
    np.testing.assert_array_equal(output.gate, gate)


def test_friction_takes_every_channel_alike():
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    options = dict(region_size=5, core_size=3)
    # A mean over channels does not grow with them; float32 sums of 48 numbers.
    repeated = ops.friction(np.tile(x, 4), **options)
    close(repeated, ops.friction(x, **options), rtol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 3))])
@pytest.mark.parametrize(("m", "d"), [(1, 3), (2, 4), (3, 4), (3, 5)])
def test_open_tiles_are_the_ordinary_convolution(m, d, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, 4)).astype(np.float32)
    core = rng.normal(size=(m, m, 4, 3)).astype(np.float32)
    expected = lax.conv_general_dilated(
        x, core, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = ops.inertial_conv_tiled(
        x, core, region_size=d, threshold=-1.0, padding=padding
    ).y
    # float32, sums of 36 products near 1.
    close(y, expected, rtol=1e-5, atol=1e-5)


# The ladder of capacities

RNG = np.random.default_rng(0)
IMAGES = (
    RNG.normal(size=(5, 7, 6, 2)) * np.array([1, 3, 0.1, 1, 1])[:, None, None, None]
)
CORE = RNG.normal(size=(3, 3, 2, 3))


def tiled(x, core, threshold, capacities=None, **settings):
    return ops.inertial_conv_tiled(
        x, core, region_size=4, threshold=threshold, capacities=capacities, **settings
    ).y


@pytest.fixture
def small_chunks(monkeypatch):
    """Two images a chunk: five are two chunks and one image."""
    size = 2 * IMAGES.nbytes // len(IMAGES)
    monkeypatch.setattr(sys.modules["inertia_jax.ops.tiled"], "_CHUNK_BYTES", size)


@pytest.mark.parametrize("low", ["mean", "sample"])
@pytest.mark.parametrize("capacities", LADDERS, ids=str)
@pytest.mark.parametrize("chunks", ["one chunk", "chunks of two"])
def test_capacities_change_no_result(chunks, capacities, low, request, x64):
    if chunks == "chunks of two":
        request.getfixturevalue("small_chunks")
    frictions = friction_of(tile_pad(IMAGES, "SAME", 3, 2)[0], 4, 3, (2, 2))
    dense = jax.jit(lambda t: tiled(IMAGES, CORE, t, low=low))
    ladder = jax.jit(lambda t: tiled(IMAGES, CORE, t, capacities, low=low))
    shares = []
    for share in (0.05, 0.2, 0.4, 0.7, 0.95):
        threshold = between(frictions, share)
        shares.append(np.mean(frictions > threshold))
        close(ladder(threshold), dense(threshold))
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] < 1
    for threshold in (-1.0, np.inf):
        close(ladder(threshold), dense(threshold))


TRANSFORMED = {
    "value": lambda f, g: f,
    "gradient": lambda f, g: jax.grad(g, (0, 1, 2)),
    "jvp": lambda f, g: lambda *a: jax.jvp(f, a, jax.tree.map(jnp.cos, a)),
    "vmap": lambda f, g: jax.vmap(f, (0, None, None)),
    "vmap of all": lambda f, g: (
        lambda x, core, t: jax.vmap(f)(
            x, jnp.stack([core, -core]), jnp.stack([t, t / 2])
        )
    ),
    "grad of vmap": lambda f, g: jax.grad(
        lambda x, core, t: jax.vmap(g, (0, None, None))(x, core, t).sum(), (0, 1, 2)
    ),
    "vmap of grad": lambda f, g: jax.vmap(jax.grad(g, (0, 1, 2)), (0, None, None)),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_ladder_transforms_as_the_dense_form_does(transform, small_chunks, x64):
    x, threshold = IMAGES[:2], jnp.asarray(1.2)
    x = jnp.stack([x, 2 * x]) if "vmap" in transform else jnp.asarray(x)

    def transformed(capacities):
        def f(x, core, threshold):
            return tiled(x, core, threshold, capacities, gate_gradient="ste")

        def g(*args):
            return (f(*args) ** 2).sum()

        return jax.jit(TRANSFORMED[transform](f, g))(x, jnp.asarray(CORE), threshold)

    gate = ops.inertial_conv_tiled(
        x.reshape(-1, 7, 6, 2), CORE, region_size=4, threshold=threshold
    ).gate
    assert 0.1 < gate.mean() < 0.9
    close(transformed(LADDERS[0]), transformed(None))


# Derivatives


@pytest.mark.parametrize("reference", ["center", "core_mean"])
@pytest.mark.parametrize("metric", METRICS)
def test_friction_has_the_derivatives_of_its_definition(metric, reference, x64):
    # Normal numbers: no |difference|, and no two candidates of `max`, within the step.
    x = np.random.default_rng(1).normal(size=(2, 6, 5, 3))
    options = dict(region_size=4, core_size=2, metric=metric, reference=reference)
    f = jax.jit(lambda x: ops.friction(x, strides=(1, 2), **options))
    # Central differences of step 1e-6: errors of 1e-16 / 1e-6 and, here, less.
    check_grads(f, (x,), 1, ("fwd", "rev"), atol=1e-7, rtol=1e-7, eps=1e-6)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("combine", COMBINES)
def test_window_reading_has_the_derivatives_of_its_definition(combine, strides, x64):
    rng = np.random.default_rng(2)
    x, core = rng.normal(size=(2, 6, 6, 2)), rng.normal(size=(2, 2, 2, 3))
    weights = random_weights(rng, combine, 3, core)
    options = dict(region_size=4, combine=combine, strides=strides)
    friction = ops.friction(x, region_size=4, core_size=2, strides=strides)
    threshold = between(friction, 0.5)

    @jax.jit
    def f(x, core, weights):
        inputs = dict(threshold=threshold, weights=weights)
        return ops.inertial_conv(x, core, **inputs, **options).y

    check_grads(
        f, (x, core, weights), 1, ("fwd", "rev"), atol=1e-6, rtol=1e-6, eps=1e-6
    )


READINGS = {
    "window": ops.inertial_conv,
    "tiled": ops.inertial_conv_tiled,
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reading", READINGS)
def test_ste_adds_the_tangent_of_a_sigmoid(reading, per_channel, x64):
    if reading == "tiled" and per_channel:
        pytest.skip("the tiled reading takes one threshold")
    slope, x, core = 3.0, jnp.asarray(IMAGES), jnp.asarray(CORE)
    threshold = jnp.asarray([0.7, 1.1, 1.6]) if per_channel else jnp.asarray(1.1)

    def op(x, core, threshold, **settings):
        return READINGS[reading](
            x, core, region_size=4, threshold=threshold, **settings
        )

    def ste(*args):
        return op(*args, gate_gradient="ste", slope=slope).y

    def expected(x, core, threshold):
        """The select, and a sigmoid that only the gate moves."""
        high, low = op(x, core, -jnp.ones(())).y, op(x, core, jnp.asarray(jnp.inf)).y
        y, _, friction = op(x, core, threshold)
        if reading == "tiled":
            friction = friction.repeat(2, 1)[:, :7].repeat(2, 2)[:, :, :6]
        s = jax.nn.sigmoid(
            slope * (friction[..., None] - threshold.reshape(1, 1, 1, -1))
        )
        return y, s, (s - lax.stop_gradient(s)) * lax.stop_gradient(high - low)

    args = (x, core, threshold)
    y, s, _ = expected(*args)
    np.testing.assert_array_equal(ste(*args), op(*args).y)
    rng = np.random.default_rng(3)
    cotangent = rng.normal(size=y.shape)
    tangents = jax.tree.map(lambda a: rng.normal(size=a.shape), args)
    gradient = jax.jit(lambda *args: jax.vjp(ste, *args)[1](cotangent))(*args)

    high, low = op(x, core, -jnp.ones(())).y, op(x, core, jnp.asarray(jnp.inf)).y
    by_hand = -cotangent * slope * s * (1 - s) * (high - low)
    by_hand = by_hand.sum((0, 1, 2)) if per_channel else by_hand.sum()
    close(gradient[2], by_hand)
    surrogate = jax.jit(
        jax.grad(lambda *a: ((sum(expected(*a)[::2])) * cotangent).sum(), (0, 1, 2))
    )
    close(gradient, surrogate(*args))
    # <cotangent, J t> = <J^T cotangent, t>
    tangent = jax.jvp(ste, args, tangents)[1]
    products = jax.tree.map(lambda a, b: (a * b).sum(), gradient, tangents)
    close((cotangent * tangent).sum(), sum(products))
    none = jax.grad(lambda t: (op(x, core, t).y * cotangent).sum())(threshold)
    np.testing.assert_array_equal(none, jnp.zeros_like(threshold))
