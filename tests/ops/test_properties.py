"""What holds for all images, kernels and thresholds, whatever numbers they are."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from inertia_jax import ops

# A function is compiled once for each shape, and then tried on many numbers.
tried = settings(max_examples=25, deadline=None, derandomize=True, database=None)
few = st.integers(-4, 4).map(float)
wide = few | st.floats(-1e3, 1e3, width=32)
odd = few | st.sampled_from((np.nan, np.inf, -np.inf))


def filled(shape, numbers=wide):
    return arrays.arrays(np.float32, shape, elements=numbers)


@functools.cache
def jitted(operation, **options):
    return jax.jit(functools.partial(getattr(ops, operation), **options))


# Shapes of images and filters, among them empty and single axes; strides and padding.
CONVOLUTIONS = [
    ((2, 5, 4, 3), (3, 3, 3, 2), 1, ((1, 1), (1, 1))),
    ((1, 1, 1, 1), (1, 1, 1, 1), 1, ((0, 0), (0, 0))),
    ((1, 1, 6, 2), (1, 3, 2, 1), 2, ((0, 0), (2, 0))),
    ((0, 3, 3, 1), (3, 3, 1, 2), 1, ((1, 1), (1, 1))),
    ((1, 2, 2, 2), (3, 3, 2, 3), 1, ((0, 0), (0, 0))),
]


@pytest.mark.parametrize(("size", "filters", "strides", "pads"), CONVOLUTIONS, ids=str)
@tried
@given(data=st.data())
def test_conv2d_is_the_sum_over_windows(size, filters, strides, pads, data):
    x = data.draw(filled(size, odd))
    kernel = data.draw(filled(filters, few))
    padded = np.pad(x, ((0, 0), *pads, (0, 0))).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view
    with np.errstate(invalid="ignore"):
        if min(np.subtract(padded.shape[1:3], filters[:2])) < 0:
            expected = np.zeros((size[0], 0, 0, filters[3]))
        else:
            views = windows(padded, filters[:2], (1, 2))[:, ::strides, ::strides]
            expected = np.stack(
                [
                    np.sum(views * kernel[..., out].transpose(2, 0, 1), (3, 4, 5))
                    for out in range(filters[3])
                ],
                axis=-1,
            )
    found = jitted("conv2d", strides=strides, padding=pads)(x, kernel)
    # Sums of at most 27 products of small integers are exact.
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(("size", "window"), [((2, 5, 4, 1), 2), ((1, 1, 3, 2), 1)])
@tried
@given(data=st.data())
def test_max_pool2d_is_the_largest_of_each_square(size, window, data):
    x = data.draw(filled(size, odd))
    n, h, w, c = size
    rows, columns = h // window, w // window
    squares = x[:, : rows * window, : columns * window].reshape(
        n, rows, window, columns, window, c
    )
    found = jitted("max_pool2d", window=window)(x)
    np.testing.assert_array_equal(found, squares.max((2, 4)))


@pytest.mark.parametrize("reference", ["center", "core_mean"])
@pytest.mark.parametrize("metric", ["l1", "l2", "max"])
@tried
@given(data=st.data())
def test_friction_is_even_scales_and_knows_no_level(metric, reference, data):
    x = data.draw(filled((2, 6, 5, 4), st.integers(-64, 64).map(float)))
    level = data.draw(st.integers(-64, 64))
    measure = jitted(
        "friction",
        **dict(region_size=4, core_size=2, padding="VALID"),
        **dict(metric=metric, reference=reference),
    )
    friction = measure(x)
    assert np.all(friction >= 0)
    # Sums of these numbers, quarters of them and their squares are exact.
    np.testing.assert_array_equal(measure(x + level), friction)
    np.testing.assert_array_equal(measure(-x), friction)
    factor = 16 if metric == "l2" else 4
    np.testing.assert_array_equal(measure(4 * x), factor * friction)
    np.testing.assert_array_equal(measure(np.full_like(x, level)), 0 * friction)


READINGS = {
    "inertial_conv": ("inertial_conv", {}),
    "tiled": ("inertial_conv_tiled", {}),
    "every tile": ("inertial_conv_tiled", {"capacities": None}),
}


@pytest.mark.parametrize("reading", READINGS)
@tried
@given(data=st.data())
def test_gates_close_as_the_threshold_rises(reading, data):
    operation, options = READINGS[reading]
    x = data.draw(filled((2, 6, 6, 2), odd if data.draw(st.booleans()) else wide))
    core = np.linspace(-1, 1, 3 * 3 * 2 * 2, dtype=np.float32).reshape(3, 3, 2, 2)
    apply = jitted(operation, region_size=4, **options)
    levels = sorted(data.draw(st.lists(st.floats(0, 1e3, width=32), max_size=3)))
    outputs = [apply(x, core, threshold=t) for t in (-1.0, *levels, 1e29, 1e30)]
    for wider, narrower in itertools.pairwise(outputs):
        assert not np.any(narrower.gate & ~wider.gate)
    # Below all friction every gate is open; above it those of NaN and infinity are,
    # unless the threshold closes every gate.
    assert np.all(outputs[0].gate)
    is_huge = ~(np.asarray(outputs[0].friction) <= 1e29)
    np.testing.assert_array_equal(outputs[-2].gate, is_huge)
    assert not np.any(outputs[-1].gate)
    if operation == "inertial_conv_tiled" and np.isfinite(x).all():
        dense = jitted("conv2d")(x, core)
        # 18 products of numbers below 1e3, of which rounding loses 1e-7 each.
        np.testing.assert_allclose(outputs[0].y, dense, rtol=1e-5, atol=1e-2)


RANKS = [(1, 1), (2, 1), (2, 3), (4, 3), (4, 5)]
kernels = st.builds(
    lambda values, scale, rank: values * scale * (np.arange(5) < rank),
    arrays.arrays(np.float64, (2, 2, 4, 5), elements=wide),
    st.sampled_from((1e-6, 1.0, 1e6)),
    st.integers(0, 5),
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hosvd", "hooi"])
@tried
@given(kernel=kernels)
def test_the_error_of_factors_falls_with_ranks_within_its_bounds(method, kernel):
    with jax.enable_x64(True):
        total = np.linalg.norm(kernel)
        spectra = [
            np.linalg.svd(np.moveaxis(kernel, axis, 0).reshape(size, -1))[1]
            for axis, size in ((2, 4), (3, 5))
        ]
        errors = []
        for ranks in RANKS:
            options = dict(rank_in=ranks[0], rank_out=ranks[1], method=method)
            factors = ops.tucker2(kernel, **options)
            found = ops.tucker2_to_kernel(factors)
            errors.append(np.linalg.norm(np.asarray(found) - kernel))
            lost = [np.sum(s[r:] ** 2) for s, r in zip(spectra, ranks, strict=True)]
            slack = 1e-7 * total  # HOOI stops at a change of 1e-5 of the error.
            # De Lathauwer et al., 2000, property 10: no more than both modes lose, and
            # no less than either.
            assert errors[-1] <= np.sqrt(sum(lost)) + slack
            assert errors[-1] >= np.sqrt(max(lost)) - slack
        # HOOI finds local optima, of which that of more ranks may be the worse.
        if method == "hosvd":
            assert all(b <= a + slack for a, b in itertools.pairwise(errors))
        assert errors[-1] <= slack


@tried
@given(
    values=arrays.arrays(np.float64, st.integers(1, 6), elements=st.floats(0, 1e3)),
    shares=st.tuples(*[st.floats(1e-3, 1)] * 2),
)
def test_energy_rank_is_the_least_that_keeps_its_share(values, shares):
    values = np.sort(values)[::-1]
    energy = np.cumsum(values**2)
    low, high = (ops.energy_rank(values, share) for share in sorted(shares))
    assert 1 <= low <= high <= len(values)
    for rank, share in zip((low, high), sorted(shares), strict=True):
        assert energy[rank - 1] >= share * energy[-1] * (1 - 1e-9)
        assert rank == 1 or energy[rank - 2] < share * energy[-1]
