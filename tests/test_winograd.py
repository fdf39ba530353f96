"""Winograd's form of 3x3 convolutions, against XLA's convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from inertia_jax.ops import winograd
from inertia_jax.ops.winograd import (
    winograd_conv2d,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

CASES = [
    # n, h, w, c_in, c_out, padding
    (5, 8, 8, 3, 4, ((1, 1), (1, 1))),
    (7, 9, 7, 3, 4, ((1, 1), (1, 1))),
    (3, 8, 5, 2, 1, ((0, 0), (0, 0))),
    (3, 8, 5, 2, 2, ((2, 0), (-1, 3))),
    (2, 4, 4, 2, 2, ((3, 2), (2, 4))),
    (2, 1, 1, 2, 3, ((1, 1), (1, 1))),
    (2, 1, 1, 2, 3, ((5, -3), (1, 1))),
    (0, 5, 5, 2, 3, ((1, 1), (1, 1))),
]


def convolve(x, kernel, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=dimensions
    )


def drawn(n, h, w, c_in, c_out, padding, dtype="float64"):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n, h, w, c_in)), dtype)
    kernel = jnp.asarray(rng.normal(size=(3, 3, c_in, c_out)), dtype)
    shape = jax.eval_shape(lambda: convolve(x, kernel, padding)).shape
    return x, kernel, jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_convolution_and_its_gradients(case, chunk_bytes, monkeypatch, x64):
    monkeypatch.setattr(winograd, "_CHUNK_BYTES", chunk_bytes)
    padding = case[-1]
    x, kernel, cotangent = drawn(*case)
    expected, pull = jax.vjp(lambda x, k: convolve(x, k, padding), x, kernel)
    # Another order of sums: rounding alone.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    same(winograd_conv2d(x, kernel, padding=padding), expected)
    x_bar, kernel_bar = pull(cotangent)
    same(winograd_input_gradient(cotangent, kernel, padding=padding), x_bar)
    same(winograd_kernel_gradient(x, cotangent, padding=padding), kernel_bar)


def test_rounding_is_that_of_the_direct_sum(x64):
    case = (4, 12, 12, 64, 64, ((1, 1), (1, 1)))
    x, kernel, _ = drawn(*case)
    exact = convolve(x, kernel, case[-1])
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)

    def root_mean_square_error(y):
        return float(jnp.sqrt(jnp.mean((y - exact) ** 2)))

    ours = root_mean_square_error(winograd_conv2d(x, kernel, padding=case[-1]))
    theirs = root_mean_square_error(convolve(x, kernel, case[-1]))
    # Of sums of 576 terms of order 1; F(4x4, 3x3) would be ten times as far off.
    assert ours < 2 * theirs < 1e-4


@pytest.mark.parametrize("which", [0, 1, 2])
def test_all_go_under_jit_and_vmap(which, monkeypatch, x64):
    monkeypatch.setattr(winograd, "_CHUNK_BYTES", 1)
    padding = CASES[0][-1]
    x, kernel, cotangent = drawn(*CASES[0])
    scales = jnp.asarray([1.0, -1.0, 2.0])

    def theirs(scale):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, padding), x, scale * kernel)
        return (y, *pull(scale * cotangent))[which]

    def ours(scale):
        return (
            lambda: winograd_conv2d(x, scale * kernel, padding=padding),
            lambda: winograd_input_gradient(
                scale * cotangent, scale * kernel, padding=padding
            ),
            lambda: winograd_kernel_gradient(x, scale * cotangent, padding=padding),
        )[which]()

    np.testing.assert_allclose(
        jax.jit(jax.vmap(ours))(scales),
        jnp.stack([theirs(scale) for scale in scales]),
        rtol=1e-12,
        atol=1e-12,
    )


def test_filters_of_another_size_are_refused():
    with pytest.raises(ValueError, match="`kernel` .*5, 5.* must be 3 x 3"):
        winograd_conv2d(
            jnp.ones((1, 8, 8, 2)), jnp.ones((5, 5, 2, 2)), padding=((1, 1), (1, 1))
        )
