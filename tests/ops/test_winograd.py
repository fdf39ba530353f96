"""Winograd's form of 3x3 convolutions, against XLA's convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import convolve, drawn

from inertia_jax.ops.conv import winograd
from inertia_jax.ops.conv.winograd import (
    winograd_conv2d,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

ONES = ((1, 1), (1, 1))
CASES = [
    # n, size, c_in, c_out, kernel_size, strides, padding
    (5, (8, 8), 3, 4, (3, 3), (1, 1), ONES),
    (7, (9, 7), 3, 4, (3, 3), (1, 1), ONES),
    (3, (8, 5), 2, 1, (3, 3), (1, 1), ((0, 0), (0, 0))),
    (3, (8, 5), 2, 2, (3, 3), (1, 1), ((2, 0), (-1, 3))),
    (2, (4, 4), 2, 2, (3, 3), (1, 1), ((3, 2), (2, 4))),
    (2, (1, 1), 2, 3, (3, 3), (1, 1), ONES),
    (2, (1, 1), 2, 3, (3, 3), (1, 1), ((5, -3), (1, 1))),
    (0, (5, 5), 2, 3, (3, 3), (1, 1), ONES),
]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_convolution_and_its_gradients(case, chunk_bytes, monkeypatch, x64):
    monkeypatch.setattr(winograd, "_CHUNK_BYTES", chunk_bytes)
    padding = case[-1]
    x, kernel, cotangent = drawn(0, *case)
    xla = lambda x, kernel: convolve(x, kernel, (1, 1), padding)  # noqa: E731
    expected, pull = jax.vjp(xla, x, kernel)
    # Only the order of summation differs.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    same(winograd_conv2d(x, kernel, padding=padding), expected)
    x_bar, kernel_bar = pull(cotangent)
    same(winograd_input_gradient(cotangent, kernel, padding=padding), x_bar)
    same(winograd_kernel_gradient(x, cotangent, padding=padding), kernel_bar)


def test_rounding_is_that_of_the_direct_sum(x64):
    x, kernel, _ = drawn(0, 4, (12, 12), 64, 64, (3, 3), (1, 1), ONES)
    exact = convolve(x, kernel, (1, 1), ONES)
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)

    def root_mean_square_error(y):
        return float(jnp.sqrt(jnp.mean((y - exact) ** 2)))

    ours = root_mean_square_error(winograd_conv2d(x, kernel, padding=ONES))
    theirs = root_mean_square_error(convolve(x, kernel, (1, 1), ONES))
    # Sums have 576 terms of order 1; F(4x4, 3x3) would be ten times as far off.
    assert ours < 2 * theirs < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2])
def test_all_go_under_jit_and_vmap(which, monkeypatch, x64):
    monkeypatch.setattr(winograd, "_CHUNK_BYTES", 1)
    x, kernel, cotangent = drawn(0, *CASES[0])
    scales = jnp.asarray([1.0, -1.0, 2.0])

    def theirs(scale):
        xla = lambda x, kernel: convolve(x, kernel, (1, 1), ONES)  # noqa: E731
        y, pull = jax.vjp(xla, x, scale * kernel)
        return (y, *pull(scale * cotangent))[which]

    def ours(scale):
        return (
            lambda: winograd_conv2d(x, scale * kernel, padding=ONES),
            lambda: winograd_input_gradient(
                scale * cotangent, scale * kernel, padding=ONES
            ),
            lambda: winograd_kernel_gradient(x, scale * cotangent, padding=ONES),
        )[which]()

    np.testing.assert_allclose(
        jax.jit(jax.vmap(ours))(scales),
        jnp.stack([theirs(scale) for scale in scales]),
        rtol=1e-12,
        atol=1e-12,
    )


def test_filters_of_another_size_are_refused():
    with pytest.raises(ValueError, match="`kernel` .*5, 5.* must be 3 x 3"):
        winograd_conv2d(jnp.ones((1, 8, 8, 2)), jnp.ones((5, 5, 2, 2)), padding=ONES)
