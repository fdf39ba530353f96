"""Convolutions with neighbouring columns joined, against XLA's convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import convolve, drawn
from jax import export

from inertia_jax.ops.conv.columns import (
    columns_to_join,
    joined_columns_conv2d,
    joined_columns_input_gradient,
)
from inertia_jax.ops.conv.dispatch import conv2d_to_apply, conv2d_to_train

pytestmark = pytest.mark.usefixtures("optimised")

ONES = ((1, 1), (1, 1))
same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        # n, size, c_in, c_out, kernel_size, strides, padding
        (3, (5, 8), 3, 4, (3, 3), (1, 1), ONES),
        (2, (9, 12), 2, 3, (5, 3), (2, 1), ((0, 3), (2, 0))),
        (2, (9, 17), 2, 3, (3, 3), (2, 2), ((1, 1), (1, 0))),
        (2, (9, 25), 2, 3, (3, 5), (1, 3), ((0, 0), (-1, 2))),
        (0, (5, 8), 3, 4, (3, 3), (1, 1), ONES),
    ],
)
def test_it_is_the_convolution(case, columns, x64):
    *_, strides, padding = case
    x, kernel, _ = drawn(0, *case)
    expected = convolve(x, kernel, strides, padding)
    assert expected.shape[2] % columns == 0
    found = joined_columns_conv2d(
        x, kernel, strides=strides, padding=padding, columns=columns
    )
    same(found, expected)


@pytest.mark.parametrize("padding", [ONES, ((0, 0), (2, 0)), ((3, -1), (1, 4))])
def test_its_gradient_is_that_of_the_images(padding, x64):
    x, kernel, cotangent = drawn(
        1, 3, (6, 8), 4, 3, (3, 5), strides=(1, 1), padding=padding
    )
    _, pull = jax.vjp(lambda x: convolve(x, kernel, (1, 1), padding), x)
    found = joined_columns_input_gradient(cotangent, kernel, padding=padding, columns=4)
    same(found, pull(cotangent)[0])


def num_joined(function, *shapes, platform):
    """Returns how many of a function's convolutions have columns joined."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = export.export(jax.jit(function), platforms=[platform])(*arrays)
    return exported.mlir_module().count("stride = [1, 2]")


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "columns"),
    [
        ((64, 16, 16), (12, 12), {"side": 3}, 2),
        ((64, 16, 16), (12, 13), {"side": 3}, 1),
        ((64, 16, 16), (10, 13), {"side": 3}, 1),
        ((64, 16, 16), (11, 13), {"side": 5}, 2),
        ((64, 16, 16), (16, 8), {"side": 3}, 2),
        ((64, 16, 16), (12, 4), {"side": 3}, 4),
        ((64, 16, 16), (3, 8), {"side": 3}, 1),
        ((64, 16, 16), (12, 0), {"side": 3}, 1),
        ((64, 16, 15), (12, 12), {"side": 3}, 1),
        ((64, 16, 6), (12, 12), {"side": 3}, 1),
        ((64, 16, 14), (12, 4), {"side": 3}, 1),
        ((3, 8, 8), (12, 12), {"side": 3}, 1),
        ((4, 8, 8), (12, 12), {"side": 3}, 2),
        ((64, 16, 16), (12, 12), {"side": 2}, 1),
        ((64, 16, 16), (12, 8), {"side": 3, "stride": 2}, 2),
        ((64, 16, 16), (12, 10), {"side": 3, "stride": 2}, 1),
        ((64, 16, 16), (12, 4), {"side": 3, "stride": 4}, 1),
    ],
)
def test_columns_are_joined_where_features_are_few(size, channels, kernel, columns):
    assert columns_to_join(size, channels, **kernel) == columns


@pytest.mark.parametrize(
    ("dtypes", "strides", "is_joined"),
    [
        (("float32", "float32"), (1, 1), True),
        (("float32", "float32"), (2, 1), True),
        (("float32", "float32"), (1, 2), False),
        (("float64", "float64"), (1, 1), False),
        (("bfloat16", "bfloat16"), (1, 1), False),
        (("float32", "bfloat16"), (1, 1), False),
    ],
)
def test_layers_join_columns_of_float32(dtypes, strides, is_joined, x64):
    shapes = (64, 16, 16, 12), (3, 3, 12, 12)
    arrays = map(jax.ShapeDtypeStruct, shapes, map(jnp.dtype, dtypes))
    apply = jax.jit(lambda *args: conv2d_to_apply(*args, strides, ONES))
    text = export.export(apply, platforms=["cpu"])(*arrays).mlir_module()
    assert ("3x4x12x24" in text) == is_joined


def test_pixels_that_are_not_finite_show():
    x, kernel, _ = drawn(4, 4, (8, 8), 6, 8, (3, 3), (1, 1), ONES, dtype="float32")
    x = x.at[0, 4, 4].set(jnp.inf)
    found = conv2d_to_apply(x, kernel, (1, 1), ONES)
    expected = convolve(x, kernel, (1, 1), ONES)
    assert not np.isfinite(found[~np.isfinite(expected)]).any()
    # Columns 2 to 5 are joined to those that the pixel belongs to.
    far = np.s_[:, :, [0, 1, 6, 7]]
    np.testing.assert_allclose(found[far], expected[far], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_layers_join_columns_on_cpu_alone(platform):
    (n,) = export.symbolic_shape("n")
    shapes = (64, 16, 16, 12), (3, 3, 12, 12)
    count = functools.partial(num_joined, platform=platform)

    def apply(x, kernel):
        return conv2d_to_apply(x, kernel, (1, 1), ONES)

    def input_gradient(x, kernel):
        train = functools.partial(conv2d_to_train, strides=(1, 1), padding=ONES)
        return jax.grad(lambda x: jnp.sum(jnp.sin(train(x, kernel))))(x)

    on_cpu = platform == "cpu"
    assert count(apply, *shapes) == on_cpu
    assert count(apply, (n, *shapes[0][1:]), shapes[1]) == on_cpu
    assert count(input_gradient, *shapes) == 2 * on_cpu
    # The image's gradient has few features, and the output more; then the other way.
    assert count(input_gradient, (64, 16, 16, 8), (3, 3, 8, 14)) == on_cpu
    assert count(input_gradient, (64, 16, 16, 14), (3, 3, 14, 8)) == on_cpu


def test_sides_may_be_symbols(no_shape_checks):
    (height,) = export.symbolic_shape("height", constraints=["height >= 8"])

    def apply(x, kernel):
        return conv2d_to_apply(x, kernel, (1, 1), ONES)

    # Whether columns are worth joining is not known then.
    shapes = (64, height, 16, 12), (3, 3, 12, 12)
    assert num_joined(apply, *shapes, platform="cpu") == 0


def test_layers_give_what_xla_gives():
    x, kernel, cotangent = drawn(
        2, 4, (9, 8), 5, 7, (3, 3), (1, 1), ONES, dtype="float32"
    )

    def pulled(convolve):
        y, pull = jax.vjp(lambda *a: convolve(*a, (1, 1), ONES), x, kernel)
        return y, *pull(cotangent)

    assert num_joined(
        lambda *a: conv2d_to_train(*a, (1, 1), ONES),
        x.shape,
        kernel.shape,
        platform="cpu",
    )
    for ours in (conv2d_to_apply, conv2d_to_train):
        for found, expected in zip(pulled(ours), pulled(convolve), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_joined_columns_go_under_vmap_and_forward_over_reverse():
    x, kernel, _ = drawn(3, 4, (8, 8), 5, 7, (3, 3), (1, 1), ONES, dtype="float32")
    kernels = jnp.stack([kernel, 2 * kernel])

    def second(convolve):
        def loss(kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, (1, 1), ONES)))

        along = lambda kernel: jax.jvp(jax.grad(loss), (kernel,), (kernel,))  # noqa: E731
        return jax.vmap(along)(kernels)

    for ours in (conv2d_to_apply, conv2d_to_train):
        for found, expected in zip(second(ours), second(convolve), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
