"""Convolution as layers apply it: the same numbers, whatever computes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import convolve, drawn
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import inertia_jax as ij
from inertia_jax.ops.conv import dispatch as conv_layers
from inertia_jax.ops.conv import gradients as conv_grad
from inertia_jax.ops.conv import winograd
from inertia_jax.ops.conv.dispatch import conv2d_to_apply, conv2d_to_train
from inertia_jax.ops.inertial import ladder

pytestmark = pytest.mark.usefixtures("optimised")

ONES = ((1, 1), (1, 1))


@pytest.fixture
def all_forms(monkeypatch):
    """Takes Winograd's form and products at sizes where XLA's would be quicker."""
    monkeypatch.setattr(conv_layers, "_LEAST_CHANNELS", 4)
    monkeypatch.setattr(conv_layers, "_LEAST_TILES", 1)
    x, kernel, _ = drawn(0, *CASES[0], "float32")
    jaxpr = jax.make_jaxpr(lambda x, k: conv2d_to_apply(x, k, (1, 1), ONES))(x, kernel)
    assert str(jaxpr).count("dot_general") == 16


@pytest.fixture(params=[4, 6], ids=["winograd", "products"])
def kernel_gradient_of(request, monkeypatch):
    monkeypatch.setattr(
        conv_layers, "_LEAST_CHANNELS_OF_KERNEL_GRADIENT", request.param
    )


CASES = [
    # n, size, c_in, c_out, kernel_size, strides, padding
    (5, (9, 7), 4, 5, (3, 3), (1, 1), ONES),
    (5, (9, 7), 3, 4, (3, 3), (1, 1), ONES),
    (4, (9, 7), 4, 4, (3, 3), (2, 2), ONES),
    (3, (8, 8), 4, 5, (3, 2), (1, 1), ((0, 2), (1, 0))),
    (3, (8, 11), 2, 5, (2, 3), (2, 3), ((0, 2), (1, 0))),
    (2, (12, 12), 4, 4, (5, 5), (1, 1), ((0, 0), (0, 0))),
    (2, (6, 6), 4, 4, (1, 1), (1, 1), ((0, 0), (0, 0))),
    (1, (20, 20), 4, 4, (7, 7), (2, 2), ((3, 3), (3, 3))),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ours", [conv2d_to_train, conv2d_to_apply])
def test_outputs_and_gradients_are_xlas_under_jit(
    case, ours, all_forms, kernel_gradient_of, x64
):
    *_, strides, padding = case
    x, kernel, cotangent = drawn(1, *case)

    def pulled(convolve):
        y, pull = jax.vjp(lambda *args: convolve(*args, strides, padding), x, kernel)
        return y, *pull(cotangent)

    found, expected = jax.jit(pulled, static_argnums=0)(ours), pulled(convolve)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [CASES[0], CASES[2], CASES[6]], ids=["unit", "strided", "1x1"]
)
def test_training_goes_under_vmap_and_forward_over_reverse(
    case, all_forms, kernel_gradient_of, x64
):
    *_, strides, padding = case
    x, kernel, _ = drawn(2, *case)
    kernels = jnp.stack([kernel, 2 * kernel])

    def loss(conv, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel, strides, padding)))

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


@pytest.mark.slow
@pytest.mark.parametrize("moved", ["x", "kernel", "both"])
def test_application_has_forward_mode(moved, all_forms, x64):
    x, kernel, _ = drawn(3, *CASES[0])
    x_dot = jnp.sin(x) if moved != "kernel" else jnp.zeros_like(x)
    kernel_dot = jnp.cos(kernel) if moved != "x" else jnp.zeros_like(kernel)

    def along(convolve):
        def at(t):
            # An argument that does not move has no tangent at all, not even zeros.
            x_t = x + t * x_dot if moved != "kernel" else x
            kernel_t = kernel + t * kernel_dot if moved != "x" else kernel
            return convolve(x_t, kernel_t, (1, 1), ONES)

        return jax.jvp(at, (0.5,), (1.0,))

    for a, b in zip(along(conv2d_to_apply), along(convolve), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def lowered(platform, width, size, *, train):
    """Lowers a network's gradient in training mode, or its outputs, for a platform."""
    model = ij.create_model("resnet20", width=width)
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda: ij.init_variables(model, jax.random.key(0), (size, size, 3))
    )

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return model.apply(variables, x)
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    function = jax.jit(jax.grad(loss) if train else loss)
    arguments = variables["params"], variables["batch_stats"], x
    return export.export(function, platforms=[platform])(*arguments).mlir_module()


@pytest.mark.slow
def test_networks_take_products_in_training_on_cpu_alone(monkeypatch):
    monkeypatch.setattr(conv_grad, "_CHUNK_BYTES", 1)
    # Nineteen convolutions are loops over chunks of images, on no other platform.
    text = functools.partial(lowered, width=0.2, size=8, train=True)
    assert text("cpu").count("stablehlo.while") == 19
    for platform in ("tpu", "cuda"):
        assert "stablehlo.while" not in text(platform)


@pytest.mark.slow
def test_networks_convolve_without_zeros_in_training_on_cpu_alone():
    # Two convolutions of stride 2 are four phases each; elsewhere outputs are dilated.
    text = functools.partial(lowered, width=0.2, size=8, train=True)
    dilated = "lhs_dilate = [2, 2]"
    assert dilated not in text("cpu")
    assert text("tpu").count(dilated) == text("cuda").count(dilated) == 2


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_networks_take_winograds_form_on_cpu_alone(train):
    # Five convolutions have 64 channels in and out, and unit stride.
    text = functools.partial(lowered, width=1.0, size=48, train=train)
    passes = 2 if train else 1
    products = {
        platform: text(platform).count("stablehlo.dot_general")
        for platform in ("cpu", "tpu", "cuda")
    }
    assert products["cpu"] >= products["tpu"] + 5 * 16 * passes
    assert products["tpu"] == products["cuda"]


@pytest.mark.parametrize(
    ("shape", "channels", "dtype", "pays"),
    [
        ((1, 16, 16), 48, "float32", True),
        ((1, 16, 15), 48, "float32", True),
        ((1, 16, 14), 48, "float32", False),
        ((16, 3, 3), 48, "float32", True),
        ((15, 3, 3), 48, "float32", False),
        ((1, 16, 16), 47, "float32", False),
        ((1, 16, 16), 48, "bfloat16", False),
        ((0, 16, 16), 48, "float32", False),
    ],
)
def test_winograds_form_is_for_many_channels_and_tiles(shape, channels, dtype, pays):
    x = jax.ShapeDtypeStruct((*shape, channels), jnp.dtype(dtype))
    kernel = jax.ShapeDtypeStruct((3, 3, channels, 48), jnp.dtype(dtype))
    jaxpr = str(
        jax.make_jaxpr(lambda x, k: conv2d_to_apply(x, k, (1, 1), ONES))(x, kernel)
    )
    assert ("dot_general" in jaxpr) == pays


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 24])
def test_it_goes_inside_shard_map_with_its_checks(
    chunk_bytes, all_forms, monkeypatch, x64
):
    monkeypatch.setattr(winograd, "_CHUNK_BYTES", chunk_bytes)
    x, kernel, cotangent = drawn(4, 4, (9, 7), 4, 5, (3, 3), (1, 1), ONES)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def outputs(conv, x, kernel):
        each = functools.partial(conv, strides=(1, 1), padding=ONES)
        spec = PartitionSpec("data")
        specs = {"in_specs": (spec, PartitionSpec()), "out_specs": spec}
        return jax.shard_map(each, mesh=mesh, **specs)(x, kernel)

    def pulled(conv):
        y, pull = jax.vjp(functools.partial(outputs, conv), x, kernel)
        return y, *pull(cotangent)

    found = jax.jit(pulled, static_argnums=0)(conv2d_to_apply)
    for a, b in zip(found, pulled(convolve), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)], ids=["3x3", "1x1"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=["unit", "strided"])
def test_batches_spread_explicitly_are_xlas(kernel_size, strides, all_forms, x64):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x, kernel, _ = drawn(5, 4, (8, 8), 4, 4, kernel_size, strides, ONES)

    def loss(conv, x, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel, strides, ONES)))

    grad = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        whole = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
        found = [grad(f, spread, whole) for f in (conv2d_to_apply, conv2d_to_train)]
    for gradients in found:
        assert jax.typeof(gradients[0]).sharding.spec[0] == "data"
        for a, b in zip(gradients, grad(convolve, x, kernel), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "size"), [(24, (8, 8)), (37, (7, 8))])
@pytest.mark.parametrize(
    ("tile_size", "low"), [(2, "mean"), (2, "sample"), (3, "mean"), (4, "sample")]
)
def test_tiles_agree_with_the_dense_form(images, size, tile_size, low, monkeypatch):
    """There are 48 channels and several chunks, the last of them smaller or not."""
    monkeypatch.setattr(ladder, "CHUNK_BYTES", 12 * 8 * 8 * 48 * 4)
    monkeypatch.setattr(conv_layers, "_LEAST_TILES_TO_PREPARE", 64)
    x, core, _ = drawn(6, images, size, 48, 48, (3, 3), (1, 1), ONES, "float32")
    tiles = [-(-side // tile_size) for side in size]
    friction = np.random.default_rng(7).random((images, *tiles), np.float32)

    @functools.partial(jax.jit, static_argnames="capacities")
    def call(threshold, capacities):
        return ij.ops.inertial_conv_tiled(
            x,
            core,
            region_size=2 + tile_size,
            padding=1,
            threshold=threshold,
            friction=friction,
            low=low,
            capacities=capacities,
        ).y

    for share in (0.0, 0.1, 0.6, 1.0):
        found, expected = (call(1 - share, c) for c in ((0.2, 1.0), None))
        # Sums of 432 terms of order 1 are rounded, and a mean is taken four times.
        np.testing.assert_allclose(found, expected, atol=5e-4)


def test_filters_are_not_prepared_for_few_tiles():
    def products(images):
        x = jax.ShapeDtypeStruct((images, 8, 8, 48), jnp.float32)
        core = jax.ShapeDtypeStruct((3, 3, 48, 48), jnp.float32)
        call = functools.partial(
            ij.ops.inertial_conv_tiled, region_size=4, padding=1, threshold=0.5
        )
        return str(jax.make_jaxpr(lambda x, core: call(x, core).y)(x, core)).count(
            "dot_general"
        )

    assert products(64) > products(63) + 16


def test_bad_geometry_is_named():
    layer = ij.Tucker2Conv(8, 3, 2, 2, strides=(1, 2, 3))
    with pytest.raises(ValueError, match="`strides` .*one or two integers"):
        layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    layer = ij.Tucker2Conv(8, 3, 2, 2, strides=0)
    with pytest.raises(ValueError, match="`strides` .*>= 1"):
        layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))


def test_images_of_any_number_are_exported():
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 16, 16, 48), jnp.float32)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 48, 48)).astype(np.float32)
    function = jax.jit(lambda x: conv2d_to_apply(x, kernel, (1, 1), ONES))
    exported = export.export(function)(x)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 48)).astype(np.float32)
    # Sums of 432 terms of order 1 are taken in another order.
    np.testing.assert_allclose(
        exported.call(images), function(images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)], ids=["3x3", "1x1"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=["unit", "strided"])
def test_gradients_for_images_of_any_number_are_exported(kernel_size, strides):
    x, kernel, _ = drawn(6, 3, (9, 8), 4, 5, kernel_size, strides, ONES, "float32")

    def loss(kernel, x):
        return jnp.sum(jnp.sin(conv2d_to_train(x, kernel, strides, ONES)))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    exported = export.export(grad)(kernel, images)
    for a, b in zip(exported.call(kernel, x), grad(kernel, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64")])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=["unit", "strided"])
def test_gradients_have_the_types_of_what_they_are_of(dtypes, strides, x64):
    x, kernel, _ = drawn(7, 3, (9, 8), 4, 5, (3, 3), strides, ONES)
    x, kernel = x.astype(dtypes[0]), kernel.astype(dtypes[1])

    def loss(x, kernel):
        return jnp.sum(jnp.sin(conv2d_to_train(x, kernel, strides, ONES)))

    gradients = jax.grad(loss, argnums=(0, 1))(x, kernel)
    assert tuple(str(gradient.dtype) for gradient in gradients) == dtypes


@pytest.mark.slow
def test_evaluation_mode_keeps_forward_mode():
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), (12, 12, 1))
    x = jnp.ones((1, 12, 12, 1))
    _, tangent = jax.jvp(lambda x: model.apply(variables, x), (x,), (x,))
    assert tangent.shape == (1, 10)


def test_factorised_layers_keep_it_too():
    layer = ij.Tucker2Conv(8, 3, 2, 2)
    x = jnp.ones((1, 8, 8, 4))
    variables = layer.init(jax.random.key(0), x)
    _, tangent = jax.jvp(lambda x: layer.apply(variables, x), (x,), (x,))
    assert tangent.shape == (1, 8, 8, 8)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: layer.apply(variables, x, train=True), (x,), (x,))


@pytest.mark.parametrize(
    "case",
    [
        # Images are smaller than the kernel, without padding, or empty.
        (2, (2, 2), 3, 4, (3, 3), (2, 2), ((0, 0), (0, 0))),
        (2, (2, 2), 3, 4, (3, 3), (1, 1), ((0, 0), (0, 0))),
        (2, (1, 1), 3, 16, (3, 3), (1, 1), ((0, 0), (0, 0))),
        (2, (0, 0), 3, 4, (3, 3), (1, 1), ONES),
        (2, (0, 4), 3, 4, (3, 3), (2, 2), ((0, 0), (1, 1))),
        # There are images enough to join columns.
        (64, (2, 8), 12, 12, (5, 5), (1, 1), ((0, 0), (0, 0))),
        (8, (8, 8), 12, 12, (5, 5), (1, 1), ((0, 0), (-3, -3))),
        (64, (8, 8), 0, 4, (3, 3), (1, 1), ONES),
        (64, (8, 8), 4, 0, (3, 3), (1, 1), ONES),
    ],
)
def test_empty_maps_have_gradients_of_nothing(case):
    *_, strides, padding = case
    x, kernel, cotangent = drawn(8, *case, "float32")
    _, pull = jax.vjp(lambda *a: conv2d_to_train(*a, strides, padding), x, kernel)
    for gradient, array in zip(pull(cotangent), (x, kernel), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(array))


def test_no_images_have_no_gradient():
    x, kernel = jnp.zeros((0, 16, 16, 3)), jnp.ones((3, 3, 3, 4))
    gradient = jax.grad(
        lambda kernel: conv2d_to_train(x, kernel, (1, 1), ((1, 1), (1, 1))).sum()
    )(kernel)
    np.testing.assert_array_equal(gradient, np.zeros_like(kernel))


def test_chunks_of_tiles_go_inside_shard_map_with_spread_filters(monkeypatch):
    monkeypatch.setattr(ladder, "CHUNK_BYTES", 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)

    def tiles(x, kernel):
        return ij.ops.inertial_conv_tiled(
            x, kernel, region_size=4, threshold=1.2, capacities=(0.25, 0.5, 1)
        ).y

    mesh = jax.make_mesh((2,), ("a",), (AxisType.Auto,), devices=jax.devices()[:2])
    filters = PartitionSpec(None, None, None, "a")
    specs = {"in_specs": (PartitionSpec(), filters), "out_specs": filters}
    spread = jax.jit(jax.shard_map(tiles, mesh=mesh, **specs))
    np.testing.assert_allclose(spread(x, kernel), tiles(x, kernel), atol=1e-5)
    images = PartitionSpec("a")
    specs = {"in_specs": (images, PartitionSpec()), "out_specs": images}
    spread = jax.jit(jax.shard_map(tiles, mesh=mesh, **specs))
    np.testing.assert_allclose(spread(x[:2], kernel), tiles(x[:2], kernel), atol=1e-5)
