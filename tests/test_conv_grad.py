"""The gradient of a kernel as products of a few images at a time, on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import inertia_jax as ij
from inertia_jax.ops import conv_grad
from inertia_jax.ops.conv_grad import conv2d_to_train, kernel_gradient

pytestmark = pytest.mark.usefixtures("optimised")


def convolve(x, kernel, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimensions
    )


def drawn(seed, n, size, c_in, c_out, kernel_size, strides, padding, dtype):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, *size, c_in)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, c_in, c_out)), dtype)
    y = jax.eval_shape(lambda: convolve(x, kernel, strides, padding))
    return x, kernel, jnp.asarray(rng.normal(size=y.shape), dtype)


CASES = [
    # n, size, c_in, c_out, kernel_size, strides, padding
    (5, (9, 7), 3, 4, (3, 3), (1, 1), ((1, 1), (1, 1))),
    (4, (9, 7), 3, 4, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (3, (8, 8), 2, 5, (3, 2), (1, 1), ((0, 2), (1, 0))),
    (3, (8, 11), 2, 5, (2, 3), (2, 3), ((0, 2), (1, 0))),
    (2, (12, 12), 1, 3, (5, 5), (1, 1), ((0, 0), (0, 0))),
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


@pytest.mark.parametrize("case", CASES)
def test_both_gradients_are_xlas_under_jit(case, monkeypatch, x64):
    monkeypatch.setattr(conv_grad, "_FEW_OUTPUTS", 0)
    *_, strides, padding = case
    x, kernel, cotangent = drawn(1, *case, "float64")
    ours = lambda x, kernel: conv2d_to_train(x, kernel, strides, padding)  # noqa: E731
    theirs = lambda x, kernel: convolve(x, kernel, strides, padding)  # noqa: E731

    def pulled(function):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(cotangent)

    found, expected = jax.jit(pulled, static_argnums=0)(ours), pulled(theirs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(conv_grad, "_CHUNK_BYTES", 1)  # 300 sums
    x, cotangent = jnp.ones((300, 6, 6, 1)), jnp.ones((300, 6, 6, 2))
    found = kernel_gradient(
        x.astype(jnp.bfloat16),
        cotangent.astype(jnp.bfloat16),
        kernel_size=(1, 1),
        strides=(1, 1),
        padding=((0, 0), (0, 0)),
    )
    assert found.dtype == jnp.bfloat16
    # 10,800, to the eight bits of bfloat16; sums in bfloat16 would stop at 8,192.
    np.testing.assert_allclose(found.astype(np.float32), 10_800, rtol=2**-8)


def test_it_goes_under_vmap_and_forward_over_reverse(monkeypatch, x64):
    monkeypatch.setattr(conv_grad, "_FEW_OUTPUTS", 0)
    x, kernel, _ = drawn(2, *CASES[0], "float64")
    kernels = jnp.stack([kernel, 2 * kernel])

    def loss(conv, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), ((1, 1), (1, 1)))))

    ours, theirs = (functools.partial(loss, f) for f in (conv2d_to_train, convolve))
    np.testing.assert_allclose(
        jax.vmap(jax.grad(ours))(kernels),
        jax.vmap(jax.grad(theirs))(kernels),
        rtol=1e-11,
        atol=1e-11,
    )
    hessian = [
        jax.jvp(jax.grad(f), (kernel,), (jnp.ones_like(kernel),))[1]
        for f in (ours, theirs)
    ]
    np.testing.assert_allclose(*hessian, rtol=1e-11, atol=1e-11)


def train_step_text(platform, size):
    """A gradient in training mode, lowered for a platform."""
    model = ij.create_model("resnet20", width=0.2)
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda: ij.init_variables(model, jax.random.key(0), (size, size, 3))
    )

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    gradient = jax.jit(jax.grad(loss))
    arguments = variables["params"], variables["batch_stats"], x
    return jax.export.export(gradient, platforms=[platform])(*arguments).mlir_module()


def test_networks_take_it_in_training_on_cpu_alone():
    # Loops over chunks of images; no other platform has them, nor maps of 4 x 4.
    assert train_step_text("cpu", 24).count("stablehlo.while") >= 8
    assert "stablehlo.while" not in train_step_text("cpu", 4)
    for platform in ("tpu", "cuda"):
        assert "stablehlo.while" not in train_step_text(platform, 24)


def test_evaluation_mode_keeps_forward_mode():
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), (12, 12, 1))
    x = jnp.ones((1, 12, 12, 1))
    _, tangent = jax.jvp(lambda x: model.apply(variables, x), (x,), (x,))
    assert tangent.shape == (1, 10)


def test_no_images_have_no_gradient():
    x, kernel = jnp.zeros((0, 16, 16, 3)), jnp.ones((3, 3, 3, 4))
    gradient = jax.grad(
        lambda kernel: conv2d_to_train(x, kernel, (1, 1), ((1, 1), (1, 1))).sum()
    )(kernel)
    np.testing.assert_array_equal(gradient, np.zeros_like(kernel))
