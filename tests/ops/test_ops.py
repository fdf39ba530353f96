"""Convolution and pooling beside PyTorch, with gradients and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import GEOMETRIES, convolve

from inertia_jax import ops

pytestmark = pytest.mark.usefixtures("optimised")


def reference(x, kernel, strides, padding, dilation, groups):
    """Convolves in XLA's own form, whichever form `ops.conv2d` takes."""
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    options = dict(rhs_dilation=(dilation, dilation), feature_group_count=groups)
    return convolve(x, kernel, (strides, strides), pads, **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_conv2d_and_its_derivatives_equal_xlas(case, x64):
    size, c_in, c_out, k, strides, padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, size, size, c_in))
    kernel = rng.normal(size=(k, k, c_in // groups, c_out))

    def ours(x, kernel):
        return ops.conv2d(
            x,
            kernel,
            strides=strides,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    def theirs(x, kernel):
        return reference(x, kernel, strides, padding, dilation, groups)

    y = theirs(x, kernel)
    cotangent = rng.normal(size=y.shape)
    tangents = (rng.normal(size=x.shape), rng.normal(size=kernel.shape))
    # In float64 only the order of summation differs.
    close = dict(rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(jax.jit(ours)(x, kernel), y, **close)
    for a, b in zip(
        jax.vjp(ours, x, kernel)[1](cotangent),
        jax.vjp(theirs, x, kernel)[1](cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, **close)
    np.testing.assert_allclose(
        jax.jvp(ours, (x, kernel), tangents)[1],
        jax.jvp(theirs, (x, kernel), tangents)[1],
        **close,
    )
    batched = jax.vmap(ours, in_axes=(None, 0))(x, np.stack([kernel, 2 * kernel]))
    np.testing.assert_allclose(batched[1], 2 * y, **close)


def test_conv2d_equals_pytorchs():
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 9, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 2, 6)).astype(np.float32)
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))),
        stride=2,
        padding=2,
        dilation=2,
        groups=2,
    )
    ours = ops.conv2d(x, kernel, strides=2, padding=2, dilation=2, groups=2)
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_conv2d_lowers_for_tpu():
    x, kernel = jnp.zeros((2, 2, 2, 4)), jnp.zeros((3, 3, 4, 8))
    gradient = jax.grad(lambda x, k: ops.conv2d(x, k, padding=1).sum(), (0, 1))
    exported = jax.export.export(jax.jit(gradient), platforms=["tpu"])(x, kernel)
    assert "convolution" in exported.mlir_module()


@pytest.mark.parametrize(
    ("kernel_shape", "padding", "message"),
    [
        ((3, 3, 5, 6), "SAME", "`kernel` .*must take 4 channels"),
        ((3, 3, 4, 6), "CIRCULAR", "`padding`"),
        ((3, 3, 4, 6), (1, 1, 1), "`padding`"),
    ],
)
def test_conv2d_refuses_what_does_not_fit(kernel_shape, padding, message):
    with pytest.raises(ValueError, match=message):
        ops.conv2d(np.zeros((1, 8, 8, 4)), np.zeros(kernel_shape), padding=padding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": 0}, r"`strides` \(=0\) must be one or two integers >= 1"),
        ({"strides": 1.5}, "`strides`"),
        ({"strides": (1, 2, 3)}, "`strides`"),
        ({"dilation": (1, 0)}, "`dilation`"),
        ({"padding": None}, "`padding`"),
        ({"padding": ((1, 2, 3), (1, 1))}, "`padding`"),
        ({"groups": 3}, r"`groups` \(=3\) must divide the 4 output"),
        ({"padding": 2**62}, "must be one or two integers, at most 2147483647"),
    ],
)
def test_conv2d_refuses_bad_geometry(options, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        ops.conv2d(np.zeros((1, 8, 8, 3)), np.zeros((3, 3, 3, 4)), **options)


@pytest.mark.parametrize("channels", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize(("side", "size"), [(1, 4), (3, 2), (3, 4)])
def test_without_channels_there_are_zeros_or_nothing(channels, side, size):
    x, kernel = np.ones((2, size, size, channels[0])), np.ones((side, side, *channels))
    found = jax.jit(ops.conv2d)(x.astype("f4"), kernel.astype("f4"))
    np.testing.assert_array_equal(found, np.zeros((2, size, size, channels[1])))


def test_conv2d_takes_what_lax_takes(no_shape_checks):
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    kernel = np.ones((2, 3, 3, 4), np.float32)
    for padding in ("same", "SAME_LOWER", "valid"):
        expected = convolve(x, kernel, (2, 2), padding)
        found = ops.conv2d(x, kernel, strides=np.int64(2), padding=padding)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    small = ops.conv2d(x[:, :1, :1], kernel, padding="VALID")
    assert small.shape == (2, 0, 0, 4)


@pytest.mark.parametrize("size", [8, 9])
def test_max_pool2d_and_its_gradient_equal_pytorchs(size):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    their_x = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    theirs = torch.nn.functional.max_pool2d(their_x, 2)
    (theirs**2).sum().backward()
    np.testing.assert_array_equal(
        ops.max_pool2d(x, window=2), theirs.detach().numpy().transpose(0, 2, 3, 1)
    )
    gradient = jax.grad(lambda x: (ops.max_pool2d(x, window=2) ** 2).sum())(x)
    np.testing.assert_array_equal(gradient, their_x.grad.numpy().transpose(0, 2, 3, 1))


def test_of_equal_pixels_one_has_the_gradient_and_nan_is_largest():
    x = jnp.array([[2.0, 2.0], [1.0, 2.0]]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: ops.max_pool2d(x, window=2).sum())(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[1, 0], [0, 0]])
    # The first in reading order has it, as in PyTorch.
    x = jnp.array([[1.0, 2.0], [2.0, 1.0]]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: ops.max_pool2d(x, window=2).sum())(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0, 1], [0, 0]])
    for row in range(2):
        for column in range(2):
            y = ops.max_pool2d(x.at[0, row, column].set(jnp.nan), window=2)
            assert np.isnan(y).all()


@pytest.mark.parametrize("window", [0, -1, 4])
def test_a_window_outside_the_image_is_named(window):
    with pytest.raises(
        ValueError, match=rf"`window` \(={window}\) must be in \[1, 3\]"
    ):
        ops.max_pool2d(np.zeros((1, 3, 5, 2), np.float32), window=window)


def test_the_gradient_of_max_pool2d_outlives_rounding(x64, quick_compile):
    # Compiled quickly, XLA computes the pixels again for the gradient, in another loop
    # that rounds otherwise: some maxima would equal no pixel and lose their gradient.
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(8, 2, 2, 64)), rng.normal(size=(64, 10))
    scale, bias = rng.normal(1, 1, size=(2, 1, 1, 1, 64))

    def loss(x):
        y = ops.max_pool2d(jax.nn.relu(x * scale + bias), window=2)
        return jax.nn.logsumexp(y[:, 0, 0] @ weights, axis=-1).sum()

    gradient = jax.jit(jax.grad(loss))(x)

    y = np.maximum(x * scale + bias, 0)
    largest = y.max((1, 2), keepdims=True)
    logits = largest[:, 0, 0] @ weights
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (y == largest) * (y > 0) * scale * (share @ weights.T)[:, None, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
