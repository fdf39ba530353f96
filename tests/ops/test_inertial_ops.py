"""Friction, gates and both readings of inertial convolution, beside plain loops."""

import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import convolve
from jax import lax
from jax.test_util import check_grads

from inertia_jax import ops
from inertia_jax.ops.inertial.settings import CLOSED

pytestmark = pytest.mark.usefixtures("optimised")

WEIGHTED = ("weighted", "weighted_channel", "weighted_input", "weighted_periphery")
COMBINES = ("mean", "sum", "max", "stack", *WEIGHTED)
METRICS = ("l1", "l2", "max")
LADDERS = [(1 / 8, 1 / 4, 1 / 2, 1), (0.4, 1), (1,)]


def close(actual, expected, rtol=1e-10, atol=1e-12):
    """Asserts equality up to the order of summation in float64, or as told."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol
        )


# These are the definitions in NumPy, region by region.


def zero_pad(x, padding, side, strides):
    if padding == "SAME":  # ceil(size / stride) windows fit; an odd zero comes after.
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
    """Yields (image, row, column) and the window there."""
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
        if combine == "weighted_periphery":
            patch = range((d - m) // 2, (d - m) // 2 + m)
            pixels = [
                region[i, j]
                for i, j in np.ndindex(d, d)
                if not (i in patch and j in patch)
            ]
            return np.where(gate, weights @ pixels @ core[m // 2, m // 2], low)
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
    """Pads as the m x m convolution does, and fills up to whole tiles."""
    x = zero_pad(x, padding, m, (1, 1))
    rows, columns = (size - m + 1 for size in x.shape[1:3])
    fill = ((0, 0), (0, -rows % n), (0, -columns % n), (0, 0))
    return np.pad(x, fill), (rows, columns)


def between(values, share):
    """Returns a threshold halfway between two frictions: rounding flips no gate."""
    values = np.unique(np.round(values, 9))
    i = min(int(share * len(values)), len(values) - 2)
    return (values[i] + values[i + 1]) / 2 if len(values) > 1 else values[0] / 2


def draw(seed, tiled=False):
    """Draws images, a core, the side of the regions and settings of both readings."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 4))
    d = m + int(rng.integers(1, 4))
    n, h, w, c, o = rng.integers((1, 4, 4, 1, 1), (3, 10, 10, 5, 5))
    x, core = rng.normal(size=(n, h, w, c)), rng.normal(size=(m, m, c, o))
    paddings = ["SAME", "VALID", 1, ((2, 0), (1, 3)), ((0, 1), (-1, 2))]
    side = m if tiled else d
    fits = lambda p: min(zero_pad(x, p, side, (1, 1)).shape[1:3]) >= side  # noqa: E731
    paddings = list(filter(fits, paddings))
    settings = dict(
        metric=METRICS[seed % 3],
        reference=("center", "core_mean")[rng.integers(2)],
        channel_stride=int(rng.integers(1, 3)),
    )
    return rng, x, core, d, paddings[rng.integers(len(paddings))], settings


def random_weights(rng, combine, n, core):
    if combine == "weighted_periphery":
        m = len(core)
        return rng.normal(size=(n + m - 1) ** 2 - m**2)
    last = {"weighted": (), "weighted_channel": core.shape[3:]}
    shape = (n, n, *last.get(combine, core.shape[2:3]))
    return rng.normal(size=shape) if combine in WEIGHTED else None


# Values


@pytest.mark.parametrize("seed", range(30))
def test_window_reading_equals_its_definition(seed, x64):
    rng, x, core, d, padding, settings = draw(seed)
    combine, m = COMBINES[seed % 8], len(core)
    # With 30 seeds, each combine is met at stride 1 and at more.
    strides = [2, 3, (1, 2), (3, 1), (2, 3)][rng.integers(5)] if seed // 8 % 2 else 1
    pair = (strides, strides) if isinstance(strides, int) else strides
    weights = random_weights(rng, combine, d - m + 1, core)
    padded = zero_pad(x, padding, d, pair)
    friction = friction_of(padded, d, m, pair, **settings)
    shape = core.shape[3:] if rng.integers(2) else ()
    threshold = np.vectorize(lambda share: between(friction, share))(rng.random(shape))
    gate = friction[..., None] > threshold.reshape(-1)
    y = window_reading(padded, core, gate, d, pair, combine, weights)

    settings.update(region_size=d, strides=strides, padding=padding)
    f = jax.jit(partial(ops.inertial_conv, combine=combine, **settings))
    output = f(x, core, threshold=threshold, weights=weights)
    close((output.y, output.friction), (y, friction))
    np.testing.assert_array_equal(output.gate, gate if shape else gate[..., 0])
    if seed < 3:  # Op by op, it takes longer.
        close(ops.friction(x, core_size=m, **settings), friction)


@pytest.mark.parametrize("combine", COMBINES)
def test_unequal_strides_leave_outputs_out(combine, x64):
    rng = np.random.default_rng(1)
    weights = random_weights(rng, combine, 3, CORE)
    padding = ((2, 2), (2, 2))
    f = partial(ops.inertial_conv, IMAGES, CORE, region_size=5, padding=padding)
    friction = ops.friction(IMAGES, core_size=3, region_size=5, padding=padding)
    options = dict(threshold=between(friction, 0.5), combine=combine, weights=weights)
    whole = f(**options)
    close(f(strides=(2, 3), **options).y, whole.y[:, ::2, ::3])


@pytest.mark.parametrize("seed", range(20))
def test_tiled_reading_equals_its_definition(seed, x64):
    rng, x, core, d, padding, settings = draw(seed, tiled=True)
    m, n, low = len(core), d - len(core) + 1, ("mean", "sample")[seed % 2]
    padded, (rows, columns) = tile_pad(x, padding, m, n)
    friction = friction_of(padded, d, m, (n, n), **settings)
    threshold = between(friction, rng.random())
    gate = friction > threshold
    y = tiled_reading(padded, core, gate, n, low)[:, :rows, :columns]

    settings.update(region_size=d, padding=padding, low=low)
    settings.update(capacities=[None, *LADDERS][rng.integers(4)])
    f = jax.jit(partial(ops.inertial_conv_tiled, **settings))
    output = f(x, core, threshold=threshold)
    close((output.y, output.friction), (y, friction))
    np.testing.assert_array_equal(output.gate, gate)


@pytest.mark.parametrize(
    ("m", "d", "padding"),
    [(1, 3, "SAME"), (2, 4, "VALID"), (3, 4, ((2, 0), (1, 3))), (3, 5, "SAME")],
)
def test_open_tiles_are_the_ordinary_convolution(m, d, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, 4)).astype(np.float32)
    core = rng.normal(size=(m, m, 4, 3)).astype(np.float32)
    expected = convolve(x, core, (1, 1), padding)
    settings = dict(region_size=d, threshold=-1.0, padding=padding)
    y = jax.jit(lambda x: ops.inertial_conv_tiled(x, core, **settings).y)(x)
    # In float32, sums of 36 products near 1 are off by less.
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
    """Makes chunks of two images: five are two chunks and one image."""
    size = 2 * IMAGES.nbytes // len(IMAGES)
    monkeypatch.setattr(
        sys.modules["inertia_jax.ops.inertial.ladder"], "CHUNK_BYTES", size
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capacities", "chunks", "low"),
    [
        (LADDERS[0], "one", "mean"),
        (LADDERS[0], "several", "mean"),
        (LADDERS[0], "several", "sample"),
        (LADDERS[1], "several", "mean"),
        (LADDERS[2], "one", "sample"),
    ],
)
def test_capacities_change_no_result(capacities, chunks, low, request, x64):
    if chunks == "several":
        request.getfixturevalue("small_chunks")
    frictions = friction_of(tile_pad(IMAGES, "SAME", 3, 2)[0], 4, 3, (2, 2))
    dense = jax.jit(lambda t: tiled(IMAGES, CORE, t, low=low))
    ladder = jax.jit(lambda t: tiled(IMAGES, CORE, t, capacities, low=low))
    thresholds = [between(frictions, share) for share in (0.05, 0.2, 0.4, 0.7, 0.95)]
    gate_rates = [np.mean(frictions > threshold) for threshold in thresholds]
    assert 0 < min(gate_rates) < 1 / 8 and 1 / 2 < max(gate_rates) < 1
    for threshold in (-1.0, *thresholds, np.inf):
        close(ladder(threshold), dense(threshold))


def test_beside_a_bright_pixel_a_tile_has_float32_digits_of_its_largest_output():
    """One output of an open tile is n^2 times the mean less the others."""
    x, friction = IMAGES.astype(np.float32), np.zeros((5, 4, 3), np.float32)
    x[1, 2, 2], friction[1, 1, 1] = 1e6, 1  # The tile's last output does not see it.
    core = CORE.astype(np.float32)
    settings = dict(padding=((0, 2), (0, 2)), friction=friction)
    f = jax.jit(lambda c: tiled(x, core, 0.5, c, **settings), static_argnums=0)
    tile = np.s_[1, 2:4, 2:4]
    dense = f(None)[tile]
    largest = np.abs(dense).max()
    close(f(LADDERS[0])[tile], dense, rtol=0, atol=8 * 2**-24 * largest)


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_images_and_known_friction_batch_together_and_apart(axes, small_chunks, x64):
    friction = np.random.default_rng(9).random((2, 5, 4, 3))
    args = np.stack([IMAGES, 2 * IMAGES]), friction
    args = [a if axis == 0 else a[0] for a, axis in zip(args, axes, strict=True)]

    @jax.jit
    def f(x, known):
        return tiled(x, CORE, 0.5, LADDERS[0], friction=known)

    def alone(i):
        return f(
            *(a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True))
        )

    close(jax.vmap(f, axes)(*args), np.stack([alone(0), alone(1)]))


def test_forms_for_tpu_change_no_result(monkeypatch, x64):
    def results(*args):
        def f(x, core, threshold):
            settings = dict(capacities=None, gate_gradient="ste", threshold=threshold)
            y, gate, _ = ops.inertial_conv_tiled(x, core, region_size=5, **settings)
            return y, gate

        y, pullback, gate = jax.vjp(f, *args, has_aux=True)
        return y, gate, pullback(jnp.cos(y))

    args = jnp.asarray(IMAGES[:2]), jnp.asarray(CORE), jnp.asarray(1.2)
    expected = jax.jit(results)(*args)
    assert 0.1 < expected[1].mean() < 0.9
    chosen = []

    def as_on_tpu(*args, default, tpu=None, **_):
        chosen.append(tpu)
        return (tpu or default)(*args)

    monkeypatch.setattr(lax, "platform_dependent", as_on_tpu)
    # Another function has a trace of its own.
    close(jax.jit(lambda *args: results(*args))(*args), expected)
    assert sum(form is not None for form in chosen) >= 4  # Views, means and two maps.


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [-1.0, 1.2, 1e30])
def test_no_tile_or_all_are_computed_on_tpu(threshold, monkeypatch, x64):
    def results(capacities):
        options = dict(region_size=5, threshold=threshold, capacities=capacities)
        return ops.inertial_conv_tiled(IMAGES[:2], CORE, **options)

    expected = results(None)
    monkeypatch.setattr(
        lax,
        "platform_dependent",
        lambda *args, default, tpu=None, **_: (tpu or default)(*args),
    )
    text = str(jax.make_jaxpr(lambda: results((1 / 4, 1)))())
    assert text.count("conv_general_dilated[") == 3 and "scatter" not in text
    close(results((1 / 4, 1)), expected)


# Derivatives


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["center", "core_mean"])
@pytest.mark.parametrize("metric", METRICS)
def test_friction_has_the_derivatives_of_its_definition(metric, reference, x64):
    # Among normal numbers no |difference| and no gap of `max` is within the step.
    x = np.random.default_rng(1).normal(size=(2, 6, 5, 3))
    options = dict(region_size=4, core_size=2, metric=metric, reference=reference)
    f = jax.jit(lambda x: ops.friction(x, strides=(1, 2), **options))
    # Central differences of step 1e-6 are off by 1e-16 / 1e-6 at most.
    check_grads(f, (x,), 1, ("fwd", "rev"), atol=1e-7, rtol=1e-7, eps=1e-6)


@pytest.mark.parametrize(
    ("combine", "strides"), [*((c, 1) for c in COMBINES), ("mean", 2), ("weighted", 2)]
)
def test_window_reading_has_the_derivatives_of_its_definition(combine, strides, x64):
    rng = np.random.default_rng(2)
    x, core = rng.normal(size=(2, 6, 6, 2)), rng.normal(size=(2, 2, 2, 3))
    weights = random_weights(rng, combine, 3, core)
    settings = dict(region_size=4, strides=strides)
    threshold = between(ops.friction(x, core_size=2, **settings), 0.5)

    @jax.jit
    def f(x, core, weights):
        inputs = dict(threshold=threshold, combine=combine, weights=weights)
        return ops.inertial_conv(x, core, **inputs, **settings).y

    check_grads(f, (x, core, weights), 1, ("fwd", "rev"), 1e-6, 1e-6, eps=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "threshold"),
    [
        (ops.inertial_conv, 1.1),
        (ops.inertial_conv, [0.7, 1.1, 1.6]),
        (partial(ops.inertial_conv_tiled, capacities=None), 1.1),
    ],
)
def test_ste_adds_the_tangent_of_a_sigmoid(op, threshold, x64):
    slope = 3.0
    args = tuple(jnp.asarray(a) for a in (IMAGES, CORE, threshold))

    def f(x, core, t, gate_gradient="ste"):
        settings = dict(gate_gradient=gate_gradient, slope=slope)
        return op(x, core, region_size=4, threshold=t, **settings).y

    def definition(x, core, t):
        """Returns the select, with a sigmoid's gradient, and that gradient by hand."""
        high = op(x, core, region_size=4, threshold=-jnp.ones(())).y
        low, _, friction = op(x, core, region_size=4, threshold=jnp.asarray(jnp.inf))
        if op is not ops.inertial_conv:
            friction = friction.repeat(2, 1)[:, :7].repeat(2, 2)[:, :, :6]
        friction, t = friction[..., None], t.reshape(1, 1, 1, -1)
        soft = jax.nn.sigmoid(slope * (friction - t))
        moved = (soft - lax.stop_gradient(soft)) * lax.stop_gradient(high - low)
        by_hand = -slope * soft * (1 - soft) * (high - low)
        return jnp.where(friction > t, high, low) + moved, by_hand

    rng = np.random.default_rng(3)
    cotangent = rng.normal(size=jax.eval_shape(f, *args).shape)
    tangents = tuple(rng.normal(size=a.shape) for a in args)
    pull = lambda f: jax.jit(lambda *a: jax.vjp(f, *a)[1](cotangent))(*args)  # noqa: E731
    y, by_hand = jax.jit(definition)(*args)
    hard = partial(f, gate_gradient="none")
    np.testing.assert_array_equal(jax.jit(f)(*args), jax.jit(hard)(*args))
    np.testing.assert_array_equal(pull(hard)[2], np.zeros(np.shape(threshold)))
    close(jax.jit(f)(*args), y)
    gradients = pull(f)
    axes = (0, 1, 2) if np.ndim(threshold) else None
    close(gradients[2], (cotangent * by_hand).sum(axes))
    close(gradients, pull(lambda *a: definition(*a)[0]))
    # <cotangent, J tangent> = <J^T cotangent, tangent>
    tangent = jax.jit(lambda *t: jax.jvp(f, args, t)[1])(*tangents)
    products = sum((a * b).sum() for a, b in zip(gradients, tangents, strict=True))
    close((cotangent * tangent).sum(), products)


def test_hard_gate_is_exactly_0_or_1_with_the_gradient_of_a_sigmoid(x64):
    friction = np.random.default_rng(0).uniform(size=999)
    f = partial(ops.hard_gate, slope=10.0)
    rounded = jnp.asarray(friction, jnp.bfloat16)
    gate = f(rounded, jnp.bfloat16(0.5))
    assert gate.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gate, rounded > 0.5)
    soft = 1 / (1 + np.exp(-10 * (friction - 0.5)))
    gradient = jax.grad(lambda *args: f(*args).sum(), (0, 1))(friction, 0.5)
    slope = 10 * soft * (1 - soft)
    close(gradient, (slope, -slope.sum()))


def test_hard_gate_opens_for_nan():
    gate = ops.hard_gate(np.array([np.nan]), np.array(0.5), slope=10.0)
    np.testing.assert_array_equal(gate, [1.0])


# Devices and types

OPS = (ops.inertial_conv, ops.inertial_conv_tiled)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_jit_and_pmap_change_no_result(op, x64):
    x = np.random.default_rng(4).normal(size=(16, 7, 6, 2))
    f = partial(op, core=CORE, region_size=4, threshold=1.1)
    plain = f(x)
    assert 0.1 < plain.gate.mean() < 0.9
    close(jax.jit(f)(x), plain)
    split = jax.pmap(f)(x.reshape(8, 2, 7, 6, 2))
    close(jax.tree.map(lambda a: a.reshape(16, *a.shape[2:]), split), plain)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["center", "core_mean"])
@pytest.mark.parametrize("metric", METRICS)
def test_friction_keeps_its_digits(metric, reference):
    settings = dict(metric=metric, reference=reference)
    f = jax.jit(partial(ops.friction, region_size=5, core_size=3, **settings))
    x = np.random.default_rng(5).normal(size=(2, 8, 8, 8))
    x[0] = 100  # Inside this flat image, expanded squares would go below 0.
    rounded = x.astype(jnp.bfloat16)
    actual = f(rounded)
    assert actual.dtype == jnp.float32 and actual.min() >= 0
    padded = zero_pad(rounded.astype(np.float64), "SAME", 5, (1, 1))
    # Both read the same rounded pixels; float32 rounds sums of 128 terms.
    close(actual, friction_of(padded, 5, 3, **settings), rtol=1e-5)
    x = 100 + 0.1 * x[1:]
    inside = f(x.astype(np.float32))[:, 2:-2, 2:-2]
    # float32 rounds pixels near 100 by up to 4e-6, and they differ by 0.1.
    close(inside, friction_of(x, 5, 3, **settings), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_bfloat16_outputs_keep_their_type(op):
    x, core = IMAGES.astype(jnp.bfloat16), CORE.astype(jnp.bfloat16)
    f = jax.jit(partial(op, region_size=4, threshold=1.1))
    y, gate, friction = f(x, core)
    assert (y.dtype, friction.dtype) == (jnp.bfloat16, jnp.float32)
    wide = f(x.astype(np.float32), core.astype(np.float32))
    np.testing.assert_array_equal(gate, wide.gate)
    # Outputs of up to 40 are rounded to 8 bits, some of them before they are averaged.
    close(y, wide.y, rtol=2**-7, atol=0.1)


# NaN, the control, what is refused, what is compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "reference", "metric"),
    [
        (ops.inertial_conv, "center", "max"),
        (ops.inertial_conv, "core_mean", "l1"),
        (ops.inertial_conv_tiled, "core_mean", "l2"),
    ],
)
def test_nan_opens_the_gates_that_compare_it_and_shows(op, reference, metric, x64):
    clean = np.random.default_rng(7).normal(size=(2, 8, 8, 2))
    x = clean.copy()
    x[1, 3, 4, 1] = np.nan
    settings = dict(region_size=5, metric=metric, reference=reference)
    f = jax.jit(partial(op, core=CORE, **settings))
    threshold = {"l1": 1.1, "l2": 2.0, "max": 2.5}[metric]
    output = f(x, threshold=threshold)
    assert 0.1 < output.gate.mean() < 0.9
    compared, seen = np.zeros(output.friction.shape, bool), np.zeros((2, 8, 8), bool)
    if op is ops.inertial_conv:
        compared[1, 1:6, 2:7] = seen[1, 1:6, 2:7] = True
        if reference == "center":  # Of the core's patch only the middle is compared.
            compared[1, 2:5, 3:6] = False
            compared[1, 3, 4] = True
    else:
        compared[1, :2, 1] = seen[1, 2:5, 3:6] = True
        seen[1, 5, 5] = True  # Its tile's last output follows from the others' mean.
    np.testing.assert_array_equal(np.isnan(output.friction), compared)
    assert np.asarray(output.gate)[compared].all()
    np.testing.assert_array_equal(np.isnan(output.y), seen[..., None].repeat(3, -1))
    # Elsewhere this is the clean image under the same gates.
    same = f(clean, threshold=threshold, friction=output.friction)
    close(np.asarray(output.y)[~seen], np.asarray(same.y)[~seen])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "op",
    [
        ops.inertial_conv,
        partial(ops.inertial_conv_tiled, capacities=None),
        partial(ops.inertial_conv_tiled, capacities=(1 / 2, 1)),
    ],
)
def test_a_closing_threshold_opens_no_gate_and_friction_is_told(op, dtype):
    x = np.random.default_rng(8).normal(size=(2, 8, 8, 2)).astype(np.float32)
    x[0, 3, 4, 1], x[1, 2, 2, 0] = np.nan, np.inf
    f = jax.jit(partial(op, core=CORE.astype(np.float32), region_size=4))
    threshold = jnp.asarray(CLOSED, dtype)
    closed, opened = (f(x, threshold=t) for t in (threshold, jnp.float32(1.1)))
    assert not closed.gate.any() and opened.gate.any()
    np.testing.assert_array_equal(closed.friction, opened.friction)
    y, opened_y = np.asarray(closed.y), np.asarray(opened.y)
    same = np.asarray(~opened.gate).repeat(8 // closed.gate.shape[1], 1)
    same = same.repeat(8 // closed.gate.shape[2], 2)
    np.testing.assert_allclose(y[same], opened_y[same], rtol=1e-5, atol=1e-5)


def test_layers_that_stay_closed_compute_no_friction(monkeypatch):
    module = sys.modules["inertia_jax.ops.inertial.tiled"]
    calls = []

    def count(friction):
        calls.append(1)
        return friction

    def counted(x, **settings):
        friction = ops.friction(x, **settings)
        # A callback without effects is left out where nothing needs its result.
        shape = jax.ShapeDtypeStruct(friction.shape, friction.dtype)
        return jax.pure_callback(count, shape, friction)

    monkeypatch.setattr(module, "region_friction", counted)
    x = np.random.default_rng(8).normal(size=(2, 8, 8, 2)).astype(np.float32)
    core = CORE.astype(np.float32)
    f = jax.jit(lambda t: ops.inertial_conv_tiled(x, core, region_size=4, threshold=t))
    for threshold, needs_friction in ((CLOSED, False), (1.1, True)):
        calls.clear()
        jax.block_until_ready(jax.jit(lambda t: f(t).y)(jnp.float32(threshold)))
        assert bool(calls) == needs_friction
    calls.clear()
    jax.block_until_ready(f(jnp.float32(CLOSED)).friction)
    assert calls


@pytest.mark.parametrize("channels", [3, 16])
def test_random_friction_is_uniform_and_of_each_image_alone(channels):
    x = np.random.default_rng(8).normal(size=(64, 8, 8, channels)).astype(np.float32)
    x[3] = 0  # Regions of a flat image differ by their places alone.
    f = partial(ops.friction, region_size=5, core_size=3, metric="random")
    noise, alone = f(x), jax.jit(f)
    assert noise.min() >= 0 and noise.max() < 1
    # The means of 64 and of 4096 uniform numbers deviate by 0.036 and 0.0045.
    close(noise[3].mean(), 0.5, atol=0.15)
    close(noise.mean(), 0.5, atol=0.02)
    assert len(np.unique(noise)) > 0.99 * noise.size
    np.testing.assert_array_equal(noise[:4], [alone(a[None])[0] for a in x[:4]])


WINDOW, TILED = OPS
REFUSED = [
    (WINDOW, dict(region_size=3), "`region_size` .*`core_size`"),
    (TILED, dict(region_size=2), "`region_size` .*`core_size`"),
    (WINDOW, dict(core=np.zeros((3, 2, 2, 4))), "`core`"),
    (TILED, dict(core=np.zeros((3, 2, 2, 4))), "`core`"),
    (WINDOW, dict(core=np.zeros((3, 3, 5, 4))), "`core`"),
    (WINDOW, dict(combine="weighted"), r"`weights` \(=None\) must have shape"),
    (WINDOW, dict(weights=np.ones((3, 3))), "`weights`"),
    (WINDOW, dict(combine="weighted", weights=np.ones((3, 3, 2))), "`weights`"),
    (WINDOW, dict(combine="weighted_input", weights=np.ones((3, 3, 4))), "`weights`"),
    (WINDOW, dict(threshold=np.ones(2)), "`threshold`"),
    (TILED, dict(threshold=np.ones(4)), "`threshold`"),
    (TILED, dict(capacities=(0.5, 0.25, 1)), "`capacities`"),
    (TILED, dict(capacities=(0.5, 0.5, 1)), "`capacities`"),
    (TILED, dict(capacities=(0.25, 0.5)), "`capacities`"),
    (TILED, dict(capacities=(0, 1)), "`capacities`"),
    (TILED, dict(capacities=()), "`capacities`"),
    *((op, dict(metric="l3"), "`metric`") for op in OPS),
    *((op, dict(reference="mean"), "`reference`") for op in OPS),
    *((op, dict(gate_gradient="soft"), "`gate_gradient`") for op in OPS),
    *((op, dict(channel_stride=0), "`channel_stride`") for op in OPS),
    *((op, dict(friction=np.ones((1, 9, 9))), "`friction`") for op in OPS),
    *((op, dict(padding="CIRCULAR"), "`padding`") for op in OPS),
    *((op, dict(padding=(1, 1, 1)), "`padding`") for op in OPS),
    *(
        (op, dict(x=np.ones((1, 8, 8, 0)), core=np.ones((3, 3, 0, 4))), "c >= 1")
        for op in OPS
    ),
    (WINDOW, dict(combine="median"), "`combine`"),
    (TILED, dict(low="median"), "`low`"),
    (WINDOW, dict(x=np.ones((1, 8, 4, 2)), padding="VALID"), "`region_size`"),
    (TILED, dict(x=np.ones((1, 8, 2, 2)), padding="VALID"), "`core`"),
]


@pytest.mark.parametrize(("op", "change", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(op, change, message, no_shape_checks):
    good = dict(x=np.ones((1, 8, 8, 2)), core=np.ones((3, 3, 2, 4)), region_size=5)
    with pytest.raises(ValueError, match=message):
        op(**(good | dict(threshold=0.1) | change))


@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_lower_for_tpu(op):
    settings = dict(region_size=4, gate_gradient="ste")

    def f(x, core, threshold):
        return op(x, core, threshold=threshold, **settings).y

    args = jnp.zeros((2, 7, 6, 2)), jnp.zeros((3, 3, 2, 4)), jnp.zeros(())
    gradient = jax.grad(lambda *args: f(*args).sum(), (0, 1, 2))
    for function in (f, gradient):
        exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*args)
        assert "convolution" in exported.mlir_module()


def test_where_products_are_narrower_open_tiles_are_computed_whole():
    def f(x, core, friction):
        options = dict(region_size=4, capacities=(1 / 4, 1), friction=friction)
        return ops.inertial_conv_tiled(x, core, threshold=0.5, **options).y

    args = jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 2, 5)), jnp.zeros((1, 4, 4))

    def rows(platform, *args):
        """Returns how many outputs of its four tiles the lowest rung computes."""
        exported = jax.export.export(jax.jit(f), platforms=[platform])(*args)
        return {n for n in (12, 16) if f"tensor<{n}x18x" in exported.mlir_module()}

    assert rows("cpu", *args) == {12}  # The fourth follows from the mean.
    assert rows("cuda", *args) == {16}
    assert rows("tpu", *args) == set()  # No tiles are gathered there.
    with jax.enable_x64(True):
        assert rows("cuda", *(x.astype(np.float64) for x in args)) == {12}


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        is_jaxpr = lambda leaf: hasattr(leaf, "eqns")  # noqa: E731
        for leaf in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            yield from sizes(leaf) if is_jaxpr(leaf) else ()


@pytest.mark.parametrize("metric", METRICS)
def test_friction_holds_no_patches(metric):
    settings = dict(region_size=5, core_size=3, metric=metric, reference="core_mean")
    f = partial(ops.friction, **settings)
    jaxpr = jax.make_jaxpr(f)(jnp.zeros((2, 16, 16, 32)))
    # The padded images are the largest; patches would be 25 times as large.
    assert max(sizes(jaxpr)) == 2 * 20 * 20 * 32


def test_gates_and_outputs_agree_in_any_type_of_threshold(x64, no_shape_checks):
    x = np.zeros((1, 2, 2, 1), np.float32)
    x[0, 1, 1] = 0.2
    core = np.ones((1, 1, 1, 1), np.float32)
    options = {"region_size": 2, "padding": "VALID"}
    friction = ops.friction(x, core_size=1, strides=2, **options)
    # The threshold lies between a float32 and the next double, or friction is whole.
    between = np.float64(friction.item()) - 1e-12
    for known, threshold in ((None, between), (np.zeros((1, 1, 1), int), -0.5)):
        results = [
            ops.inertial_conv_tiled(
                x,
                core,
                threshold=threshold,
                friction=known,
                capacities=capacities,
                **options,
            )
            for capacities in (None, (1 / 2, 1))
        ]
        for y, gate, _ in results:
            expected = x if bool(gate.all()) else np.full_like(x, x.mean())
            np.testing.assert_allclose(y, expected, rtol=1e-6)
        np.testing.assert_array_equal(results[0].gate, results[1].gate)


def test_an_integer_threshold_has_a_gradient(no_shape_checks):
    friction = jnp.array([0.9, 1.1])

    def gate(friction, at):
        return ops.hard_gate(friction, at, slope=10.0).sum()

    expected = jax.grad(gate)(friction, 1.0)
    np.testing.assert_array_equal(jax.grad(gate)(friction, 1), expected)
    with pytest.raises(ValueError, match="`slope`"):
        ops.hard_gate(friction, 1.0, slope=-1.0)
    traced = jax.jit(lambda slope: ops.hard_gate(friction, 1.0, slope=slope))
    np.testing.assert_array_equal(traced(5.0), [0, 1])
