"""Gradients of convolutions in other forms than XLA's, for training on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import convolve, drawn

from inertia_jax.ops.conv import gradients as conv_grad
from inertia_jax.ops.conv.gradients import kernel_gradient, strided_input_gradient

pytestmark = pytest.mark.usefixtures("optimised")


CASES = [
    # n, size, c_in, c_out, kernel_size, strides, padding
    (5, (9, 7), 3, 4, (3, 3), (1, 1), ((1, 1), (1, 1))),
    (4, (9, 7), 3, 4, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (3, (8, 8), 2, 5, (3, 2), (1, 1), ((0, 2), (1, 0))),
    (3, (8, 11), 2, 5, (2, 3), (2, 3), ((0, 2), (1, 0))),
    (2, (12, 12), 1, 3, (5, 5), (1, 1), ((0, 0), (0, 0))),
    (5, (9, 7), 1, 4, (3, 2), (1, 1), ((1, 1), (0, 1))),
    (3, (6, 5), 3, 2, (1, 1), (1, 1), ((0, 0), (0, 0))),
    (3, (6, 5), 3, 2, (1, 1), (2, 1), ((1, 0), (-1, 0))),
    (7, (10, 10), 4, 2, (4, 4), (2, 1), ((1, 2), (3, 0))),
    (1, (20, 20), 3, 3, (7, 7), (2, 2), ((3, 3), (3, 3))),
]


@pytest.mark.parametrize("chunk_bytes", [1, 3000], ids=["one", "some"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gradient_is_xlas(case, chunk_bytes, monkeypatch, x64):
    monkeypatch.setattr(conv_grad, "_CHUNK_BYTES", chunk_bytes)
    *_, kernel_size, strides, padding = case
    x, kernel, cotangent = drawn(0, *case, "float64")
    expected = jax.vjp(lambda k: convolve(x, k, strides, padding), kernel)[1](cotangent)
    found = kernel_gradient(
        x, cotangent, kernel_size=kernel_size, strides=strides, padding=padding
    )
    np.testing.assert_allclose(found, expected[0], rtol=1e-12, atol=1e-12)


STRIDED_CASES = [
    *(case for case in CASES if case[-2] != (1, 1)),
    # These have strides beyond the kernel, one more pixel than they reach, outputs of
    # one pixel, and more padding than the kernel has taps.
    (2, (7, 9), 2, 3, (1, 2), (3, 3), ((0, 0), (0, 0))),
    (2, (10, 9), 2, 3, (3, 3), (2, 3), ((0, 0), (1, 0))),
    (2, (3, 4), 3, 2, (3, 3), (2, 2), ((0, 0), (1, 0))),
    (2, (5, 4), 3, 2, (2, 3), (3, 2), ((4, 3), (5, 2))),
]


@pytest.mark.parametrize("case", STRIDED_CASES)
def test_the_gradient_of_strided_images_is_xlas(case, x64):
    _, size, *_, strides, padding = case
    x, kernel, cotangent = drawn(0, *case)
    expected = jax.vjp(lambda x: convolve(x, kernel, strides, padding), x)[1](cotangent)
    found = strided_input_gradient(
        cotangent, kernel, input_size=size, strides=strides, padding=padding
    )
    np.testing.assert_allclose(found, expected[0], rtol=1e-12, atol=1e-12)


def test_the_gradient_of_strided_images_keeps_bfloat16():
    case = (2, (9, 7), 3, 4, (3, 3), (2, 2), ((1, 1), (1, 1)))
    _, kernel, cotangent = (a.astype(jnp.bfloat16) for a in drawn(1, *case, "float32"))
    give = {"input_size": (9, 7), "strides": (2, 2), "padding": ((1, 1), (1, 1))}
    found = strided_input_gradient(cotangent, kernel, **give)
    assert found.dtype == jnp.bfloat16
    exact = strided_input_gradient(
        *(a.astype("float32") for a in (cotangent, kernel)), **give
    )
    # Sums of up to 16 terms of order 1 keep eight bits.
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=2**-7, atol=2**-5)


def test_bfloat16_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(conv_grad, "_CHUNK_BYTES", 1)  # This makes 300 sums.
    x, cotangent = jnp.ones((300, 6, 6, 1)), jnp.ones((300, 6, 6, 2))
    found = kernel_gradient(
        x.astype(jnp.bfloat16),
        cotangent.astype(jnp.bfloat16),
        kernel_size=(1, 1),
        strides=(1, 1),
        padding=((0, 0), (0, 0)),
    )
    assert found.dtype == jnp.bfloat16
    # bfloat16 shows 10,800 in eight bits; sums in bfloat16 would stop at 8,192.
    np.testing.assert_allclose(found.astype(np.float32), 10_800, rtol=2**-8)
