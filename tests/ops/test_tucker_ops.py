"""Tucker-2 and two factors beside their definitions, TensorLy and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from convolutions import GEOMETRIES, normal

from inertia_jax import ops
from inertia_jax.ops.tucker.unfold import (
    left_singular,
    max_ranks,
    unfold_in,
    unfold_out,
)

pytestmark = pytest.mark.usefixtures("optimised")

# In float64 only the order of summation differs.
CLOSE = dict(rtol=1e-10, atol=1e-10)


def relative_error(found, kernel):
    return np.linalg.norm(np.asarray(found) - kernel) / np.linalg.norm(kernel)


def test_hosvd_is_what_its_definition_says(x64):
    kernel = normal(3, 2, 5, 7)
    u_in = np.linalg.svd(kernel.transpose(2, 0, 1, 3).reshape(5, -1))[0][:, :3]
    u_out = np.linalg.svd(kernel.transpose(3, 0, 1, 2).reshape(7, -1))[0][:, :4]
    both = u_in @ u_in.T, u_out @ u_out.T
    expected = np.einsum("hwio,ip,oq->hwpq", kernel, *both)
    factors = ops.tucker2(kernel, rank_in=3, rank_out=4)
    assert [f.shape for f in factors] == [(5, 3), (3, 2, 3, 4), (7, 4)]
    np.testing.assert_allclose(ops.tucker2_to_kernel(factors), expected, **CLOSE)
    core = np.einsum("hwio,ir,os->hwrs", kernel, factors.u_in, factors.u_out)
    np.testing.assert_allclose(factors.core, core, **CLOSE)
    for factor in (factors.u_in, factors.u_out):
        gram = np.asarray(factor).T @ factor
        np.testing.assert_allclose(gram, np.eye(len(gram)), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 4, 100])
def test_hooi_is_tensorlys_at_as_many_iterations(num_iterations, x64):
    reason = "needs TensorLy: the extra `torch`"
    decomposition = pytest.importorskip("tensorly.decomposition", reason=reason)
    kernel = normal(3, 3, 6, 8)
    # TensorLy improves the first mode first, which is the output channels here.
    (core, (u_out, u_in)), _ = decomposition.partial_tucker(
        np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)),
        (3, 2),
        modes=[0, 1],
        n_iter_max=num_iterations,
        init="svd",
        tol=0,
    )
    theirs = np.einsum("srhw,ir,os->hwio", core, u_in, u_out)
    factors = ops.tucker2(
        kernel,
        rank_in=2,
        rank_out=3,
        method="hooi",
        num_iterations=num_iterations,
        tolerance=0.0,
    )
    # Near the end of 100 iterations, steps are below the rounding of the error: ours
    # stops, and theirs goes on.
    close = dict(rtol=1e-6, atol=1e-6) if num_iterations == 100 else CLOSE
    np.testing.assert_allclose(ops.tucker2_to_kernel(factors), theirs, **close)


def ranks_apart(kh, kw, c_in, c_out):
    """Ranks of which one exceeds kh kw times the other, if the channels suffice."""
    if c_in > kh * kw:
        return kh * kw + 1, 1
    return 1, min(kh * kw + 1, c_out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs")
def test_hooi_is_never_worse_than_hosvd_and_tensorlys_at_any_ranks(x64):
    reason = "needs TensorLy: the extra `torch`"
    decomposition = pytest.importorskip("tensorly.decomposition", reason=reason)
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 1), (3, 3), (1, 3), (2, 2)] * 2
    for i, size in enumerate([*sizes, (1, 1), (1, 2)]):
        shape = (*size, *map(int, rng.integers(1, 13, size=2)))
        ranks = tuple(int(rng.integers(1, channels + 1)) for channels in shape[2:])
        # Every third pair is one that an iterate cannot have by itself.
        rank_in, rank_out = ranks_apart(*shape) if i % 3 == 0 else ranks
        kernel = normal(*shape, seed=i)
        (core, (u_out, u_in)), _ = decomposition.partial_tucker(
            np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)),
            (rank_out, rank_in),
            modes=[0, 1],
            n_iter_max=100,
            init="svd",
            tol=0,
        )
        theirs = np.einsum("srhw,ir,os->hwio", core, u_in, u_out)
        hosvd, hooi = (
            ops.tucker2(
                kernel,
                rank_in=rank_in,
                rank_out=rank_out,
                method=method,
                tolerance=0.0,
            )
            for method in ("hosvd", "hooi")
        )
        assert [f.shape for f in hooi] == [f.shape for f in hosvd]
        for factor in (hooi.u_in, hooi.u_out):
            np.testing.assert_allclose(
                np.asarray(factor).T @ factor, np.eye(factor.shape[1]), **CLOSE
            )
        error = relative_error(ops.tucker2_to_kernel(hooi), kernel)
        before = relative_error(ops.tucker2_to_kernel(hosvd), kernel)
        assert error <= min(before, relative_error(theirs, kernel)) + 1e-7


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((1, 1, 16, 8), (4, 3)), ((1, 2, 9, 4), (7, 2)), ((1, 2, 4, 9), (2, 7))],
)
def test_hooi_is_the_optimum_where_one_rank_exceeds_the_others_share(shape, ranks, x64):
    kernel = normal(*shape)
    factors = ops.tucker2(kernel, rank_in=ranks[0], rank_out=ranks[1], method="hooi")
    expected = (shape[2:3] + ranks[:1], (*shape[:2], *ranks), shape[3:] + ranks[1:])
    assert tuple(f.shape for f in factors) == expected
    # The larger factor holds all that the smaller leaves: one truncated SVD is best.
    axis = 3 if ranks[0] > ranks[1] else 2
    unfolding = np.moveaxis(kernel, axis, 0).reshape(shape[axis], -1)
    tail = np.linalg.svd(unfolding, compute_uv=False)[min(ranks) :]
    missed = relative_error(ops.tucker2_to_kernel(factors), kernel)
    np.testing.assert_allclose(
        missed, np.linalg.norm(tail) / np.linalg.norm(kernel), **CLOSE
    )


@pytest.mark.slow
def test_hooi_of_groups_and_its_derivative_at_ranks_apart(x64):
    kernel, step = normal(1, 1, 5, 6), normal(1, 1, 5, 6, seed=1)

    @jax.jit
    def again(kernel):
        factors = ops.tucker2(kernel, rank_in=3, rank_out=2, groups=2, method="hooi")
        return ops.tucker2_to_kernel(factors, groups=2)

    expected = [
        (u[:, :2] * s[:2]) @ vt[:2]
        for u, s, vt in map(np.linalg.svd, np.split(kernel[0, 0], 2, 1))
    ]
    np.testing.assert_allclose(again(kernel)[0, 0], np.hstack(expected), **CLOSE)
    _, slope = jax.jvp(again, (kernel,), (step,))
    difference = (again(kernel + 1e-6 * step) - again(kernel - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_hooi_is_never_worse_than_hosvd():
    for seed, ranks in enumerate([(1, 1), (2, 5), (5, 2), (6, 8)] * 3):
        kernel = normal(3, 3, 6, 8, seed=seed, dtype=np.float32)
        hosvd, hooi = (
            relative_error(
                ops.tucker2_to_kernel(
                    ops.tucker2(
                        kernel, rank_in=ranks[0], rank_out=ranks[1], method=method
                    )
                ),
                kernel,
            )
            for method in ("hosvd", "hooi")
        )
        # Both are computed to a few units of float32's rounding.
        assert hooi <= hosvd + 1e-6
        if ranks == (2, 5):  # Here it does something.
            assert hooi < hosvd - 1e-3


def test_hooi_stops_at_its_tolerance(x64):
    kernel = normal(3, 3, 6, 8)
    hosvd, one, few, all_of_them = (
        relative_error(
            ops.tucker2_to_kernel(
                ops.tucker2(kernel, rank_in=2, rank_out=3, method=method, **options)
            ),
            kernel,
        )
        for method, options in (
            ("hosvd", {}),
            ("hooi", {"tolerance": 1.0}),
            ("hooi", {"tolerance": 1e-3}),
            ("hooi", {"tolerance": 0.0}),
        )
    )
    assert hosvd > one > few > all_of_them
    # The remaining changes fall like a geometric series.
    assert few - all_of_them < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_full_rank_is_the_dense_convolution(case, x64):
    size, c_in, c_out, k, strides, padding, dilation, groups = case
    kernel = normal(k, k, c_in // groups, c_out)
    x = normal(3, size, size, c_in, seed=1)
    factors = ops.tucker2(
        kernel, rank_in=c_in // groups, rank_out=c_out // groups, groups=groups
    )
    around = dict(strides=strides, padding=padding, dilation=dilation, groups=groups)
    np.testing.assert_allclose(
        ops.tucker2_to_kernel(factors, groups=groups), kernel, **CLOSE
    )
    np.testing.assert_allclose(
        jax.jit(lambda x, f: ops.tucker2_conv(x, f, **around))(x, factors),
        ops.conv2d(x, kernel, **around),
        **CLOSE,
    )


@pytest.mark.slow
def test_tucker2_conv_equals_pytorchs_dense_convolution():
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    x = normal(2, 9, 9, 4, seed=1, dtype=np.float32)
    kernel = normal(3, 3, 2, 6, dtype=np.float32)
    factors = ops.tucker2(kernel, rank_in=1, rank_out=2, groups=2, method="hooi")
    dense = np.asarray(ops.tucker2_to_kernel(factors, groups=2))
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(np.ascontiguousarray(dense.transpose(3, 2, 0, 1))),
        stride=2,
        padding=2,
        dilation=2,
        groups=2,
    )
    ours = ops.tucker2_conv(x, factors, strides=2, padding=2, dilation=2, groups=2)
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_groups_are_factorised_one_by_one(x64):
    kernel = normal(3, 3, 4, 10)
    whole = ops.tucker2(kernel, rank_in=2, rank_out=3, groups=2, method="hooi")
    assert [f.shape for f in whole] == [(8, 2), (3, 3, 2, 6), (10, 3)]
    parts = [
        ops.tucker2_to_kernel(
            ops.tucker2(kernel[..., half], rank_in=2, rank_out=3, method="hooi")
        )
        for half in (slice(0, 5), slice(5, 10))
    ]
    np.testing.assert_allclose(
        ops.tucker2_to_kernel(whole, groups=2), np.concatenate(parts, -1), **CLOSE
    )
    x = normal(2, 5, 5, 8, seed=1)
    np.testing.assert_allclose(
        ops.tucker2_conv(x, whole, groups=2),
        ops.conv2d(x, np.concatenate(parts, -1), groups=2),
        **CLOSE,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "groups", "expected"),
    [
        ((1, 1, 8, 3), 1, (3, 3)),
        ((1, 2, 8, 3), 1, (6, 3)),
        ((3, 3, 1, 32), 1, (1, 9)),
        ((3, 3, 1, 32), 4, (1, 8)),
        ((1, 1, 4, 6), 2, (3, 3)),
    ],
)
def test_ranks_are_lowered_to_what_unfoldings_have(shape, groups, expected):
    assert max_ranks(shape, groups=groups) == expected
    kernel = normal(*shape, dtype=np.float32)
    factors = ops.tucker2(
        kernel, rank_in=shape[2], rank_out=shape[3] // groups, groups=groups
    )
    u_in, core, u_out = factors
    assert u_in.shape == (groups * shape[2], expected[0])
    assert u_out.shape == (shape[3], expected[1])
    assert core.shape == (*shape[:2], expected[0], groups * expected[1])
    again = ops.tucker2_to_kernel(factors, groups=groups)
    np.testing.assert_allclose(again, kernel, atol=1e-5)


@pytest.mark.parametrize("method", ["hosvd", "hooi"])
def test_a_kernel_of_zeros_has_finite_factors(method):
    factors = ops.tucker2(np.zeros((3, 3, 4, 5)), rank_in=2, rank_out=2, method=method)
    assert all(bool(jnp.isfinite(factor).all()) for factor in factors)
    assert not np.any(ops.tucker2_to_kernel(factors))


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((3, 3, 4, 6), {"rank_in": 0}, r"`rank_in` \(=0\) must be in \[1, 4\]"),
        ((3, 3, 4, 6), {"rank_in": 5}, r"`rank_in` \(=5\) must be in \[1, 4\]"),
        ((3, 3, 4, 6), {"rank_out": 7}, r"`rank_out` \(=7\) must be in \[1, 6\]"),
        (
            (3, 3, 4, 6),
            {"rank_out": 4, "groups": 2},
            r"`rank_out` \(=4\) must be in \[1, 3\]",
        ),
        ((3, 3, 4, 6), {"groups": 4}, r"`groups` \(=4\) must divide 6"),
        ((3, 3, 4, 6), {"groups": 0}, r"`groups` \(=0\)"),
        ((6,), {}, r"`kernel` \(shape \(6,\)\) must be"),
        ((0, 3, 4, 6), {}, "with sides >= 1"),
    ],
)
def test_tucker2_refuses_what_does_not_fit(shape, change, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        ops.tucker2(np.ones(shape), **{"rank_in": 1, "rank_out": 1, **change})


def test_an_unknown_method_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match=r"`method` \(='als'\) must be hosvd or hooi"):
        ops.tucker2(np.ones((3, 3, 4, 6)), rank_in=1, rank_out=1, method="als")


def test_tucker2_conv_refuses_other_channels_and_paddings():
    factors = ops.tucker2(np.ones((3, 3, 4, 6)), rank_in=1, rank_out=1)
    with pytest.raises(ValueError, match=r"`factors` .*must take 5 channels"):
        ops.tucker2_conv(np.ones((1, 8, 8, 5)), factors)
    with pytest.raises(ValueError, match="`padding`"):
        ops.tucker2_conv(np.ones((1, 8, 8, 4)), factors, padding="CIRCULAR")


@pytest.mark.parametrize("groups", [1, 2])
def test_tucker2_conv_has_the_gradients_of_its_kernel(groups, x64):
    kernel = normal(3, 3, 4 // groups, 6)
    x = normal(2, 7, 7, 4, seed=1)
    factors = ops.tucker2(kernel, rank_in=2, rank_out=2, groups=groups)
    around = dict(strides=2, padding=1, groups=groups)

    def factorised(x, factors):
        return ops.tucker2_conv(x, factors, **around)

    def dense(x, factors):
        kernel = ops.tucker2_to_kernel(factors, groups=groups)
        return ops.conv2d(x, kernel, **around)

    cotangent = normal(*factorised(x, factors).shape, seed=2)
    ours, theirs = (
        jax.jit(lambda x, f, conv=conv: jax.vjp(conv, x, f)[1](cotangent))(x, factors)
        for conv in (factorised, dense)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_factors_batch(x64):
    kernels = normal(3, 3, 3, 4, 6)
    x = normal(2, 7, 7, 4, seed=1)

    def factorise(kernel):
        return ops.tucker2(kernel, rank_in=2, rank_out=3, method="hooi")

    factors = jax.vmap(factorise)(kernels)
    maps = jax.vmap(ops.tucker2_conv, in_axes=(None, 0))(x, factors)
    again = jax.vmap(ops.tucker2_to_kernel)(factors)
    for i, kernel in enumerate(kernels):
        one = factorise(kernel)
        np.testing.assert_allclose(maps[i], ops.tucker2_conv(x, one), **CLOSE)
        np.testing.assert_allclose(again[i], ops.tucker2_to_kernel(one), **CLOSE)


def test_bfloat16_is_factorised_in_float32_and_applied_as_it_is():
    kernel = jnp.asarray(normal(3, 3, 4, 6), jnp.bfloat16)
    x = jnp.asarray(normal(2, 7, 7, 4, seed=1), jnp.bfloat16)
    factors = ops.tucker2(kernel, rank_in=4, rank_out=6)
    assert {factor.dtype for factor in factors} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(
        ops.tucker2_to_kernel(factors), np.asarray(kernel, np.float32), atol=1e-5
    )
    halved = jax.tree.map(lambda factor: factor.astype(jnp.bfloat16), factors)
    y = ops.tucker2_conv(x, halved)
    assert y.dtype == jnp.bfloat16
    dense = ops.conv2d(x.astype(jnp.float32), kernel.astype(jnp.float32))
    # Sums of some ten terms are rounded to 8 bits three times.
    assert relative_error(y.astype(jnp.float32), np.asarray(dense)) < 0.02


def test_factors_are_products_of_matrices_but_on_tpus():
    factors = ops.tucker2(np.ones((3, 3, 4, 6), np.float32), rank_in=2, rank_out=2)
    gradient = jax.grad(lambda x, f: ops.tucker2_conv(x, f).sum(), (0, 1))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)

    def exported(*platforms):
        return jax.export.export(jax.jit(gradient), platforms=platforms)(x, factors)

    products = {
        platform: exported(platform).mlir_module().count("stablehlo.dot_general")
        for platform in ("cpu", "cuda", "tpu")
    }
    # Each of two factors has two for its gradients, and the first has one forward.
    assert products == {"cpu": 5, "cuda": 5, "tpu": 0}
    for found, expected in zip(
        jax.tree.leaves(exported("cpu", "tpu").call(x, factors)),
        jax.tree.leaves(gradient(x, factors)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_factors_have_the_same_derivatives_on_tpus(monkeypatch, x64):
    rng = np.random.default_rng(0)
    x, x_dot = rng.normal(size=(2, 3, 5, 4, 6))
    factors = ops.tucker2(rng.normal(size=(3, 3, 6, 8)), rank_in=3, rank_out=4)

    def results(x, x_dot, factors):
        f = functools.partial(ops.tucker2_conv, padding=1)
        y, pullback = jax.vjp(f, x, factors)
        pushed = jax.jvp(f, (x, factors), (x_dot, jax.tree.map(jnp.sin, factors)))
        batched = jax.vmap(f, (None, 0))(x, jax.tree.map(lambda a: a[None], factors))
        return y, pullback(jnp.cos(y)), pushed, batched

    expected = jax.jit(results)(x, x_dot, factors)
    chosen = []

    def as_on_tpu(*args, default, tpu=None, **_):
        chosen.append(tpu)
        return (tpu or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpu)
    # Another function has a trace of its own.
    found = jax.jit(lambda *args: results(*args))(x, x_dot, factors)
    assert any(chosen)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_low_rank_is_the_truncated_svd_of_each_group(groups, x64):
    kernel = normal(1, 1, 6, 4 * groups)
    factors = ops.low_rank(kernel, rank=3, groups=groups)
    assert [f.shape for f in factors] == [(6 * groups, 3), (4 * groups, 3)]
    expected = []
    for part in np.split(kernel[0, 0], groups, axis=1):
        u, s, vt = np.linalg.svd(part, full_matrices=False)
        expected.append((u[:, :3] * s[:3]) @ vt[:3])
    again = ops.low_rank_to_kernel(factors, groups=groups)
    np.testing.assert_allclose(again[0, 0], np.concatenate(expected, 1), **CLOSE)
    # Neither factor is larger than the other.
    left, right = (np.split(np.asarray(f), groups) for f in factors)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a.T @ a, b.T @ b, **CLOSE)


def test_low_rank_conv_has_strides_of_one_where_none_are_given():
    x, factors = normal(2, 5, 4, 6), ops.low_rank(normal(1, 1, 6, 4), rank=2)
    y = ops.low_rank_conv(x, factors, strides=None)
    np.testing.assert_array_equal(y, ops.low_rank_conv(x, factors))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("strides", [1, 2, (2, 1)])
def test_low_rank_conv_and_its_gradients_are_those_of_its_kernel(strides, groups, x64):
    kernel = normal(1, 1, 6 // groups, 4)
    x = normal(2, 5, 4, 6, seed=1)
    factors = ops.low_rank(kernel, rank=2, groups=groups)
    around = dict(strides=strides, groups=groups)

    def factorised(x, factors):
        return ops.low_rank_conv(x, factors, **around)

    def dense(x, factors):
        kernel = ops.low_rank_to_kernel(factors, groups=groups)
        return ops.conv2d(x, kernel, padding="VALID", **around)

    y, pull = jax.vjp(jax.jit(factorised), x, factors)
    expected, their_pull = jax.vjp(dense, x, factors)
    np.testing.assert_allclose(y, expected, **CLOSE)
    cotangent = normal(*y.shape, seed=2)
    for a, b in zip(
        jax.tree.leaves(pull(cotangent)),
        jax.tree.leaves(their_pull(cotangent)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, **CLOSE)
    two = jax.tree.map(lambda f: jnp.stack([f, 2 * f]), factors)
    batched = jax.vmap(factorised, in_axes=(None, 0))(x, two)
    np.testing.assert_allclose(batched[1], 4 * y, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "rank", "groups", "message"),
    [
        ((1, 1, 4, 6), 5, 1, r"`rank` \(=5\) must be in \[1, 4\]"),
        ((1, 1, 4, 6), 0, 1, r"`rank` \(=0\)"),
        ((1, 1, 4, 6), 4, 2, r"`rank` \(=4\) must be in \[1, 3\]"),
        ((3, 3, 4, 6), 1, 1, r"`kernel` \(shape \(3, 3, 4, 6\)\) must be \[1, 1,"),
        ((1, 1, 4, 6), 1, 4, r"`groups` \(=4\) must divide 6"),
    ],
)
def test_low_rank_refuses_what_does_not_fit(
    shape, rank, groups, message, no_shape_checks
):
    with pytest.raises(ValueError, match=message):
        ops.low_rank(np.ones(shape), rank=rank, groups=groups)


def wide_spectrum(m, n, s):
    """Returns an m x n matrix with these singular values, in float64."""
    rng = np.random.default_rng(0)

    def orthonormal(rows, columns):
        mixed = rng.choice([-1.0, 1.0], columns) * np.eye(rows, columns)
        mixed = scipy.fft.dct(mixed, axis=1, norm="ortho")
        mixed = mixed * rng.choice([-1.0, 1.0], columns)
        return scipy.fft.dct(mixed, axis=1, norm="ortho")

    return (orthonormal(m, m) * s) @ orthonormal(m, n)


def missed(vectors, matrix, s, rank):
    """Returns what the leading vectors miss, in units of the least possible."""
    kept = np.asarray(vectors, np.float64)[:, :rank]
    residual = matrix - kept @ (kept.T @ matrix)
    return np.linalg.norm(residual) / np.sqrt(np.sum(s[rank:] ** 2))


def test_singular_vectors_of_a_wide_spectrum_are_as_good_as_lapacks():
    s = np.logspace(0, -6, 128)
    matrix = wide_spectrum(128, 1152, s)
    narrow = matrix.astype(np.float32)
    ours, values = left_singular(jnp.asarray(narrow))
    direct = np.linalg.svd(narrow, full_matrices=False)[0]
    gram = np.linalg.eigh(narrow @ narrow.T)[1][:, ::-1]
    # Each of some steps in float32 rounds by 6e-8 of the largest.
    np.testing.assert_allclose(values, s, rtol=1e-5, atol=6e-7)
    # At these ranks singular values are 1e-1, 1e-3 and 1e-5 of the largest. The Gram
    # matrix only shows those above 3e-4, the square root of float32's rounding.
    for rank in (21, 64, 107):
        least = missed(direct, matrix, s, rank)
        assert missed(ours, matrix, s, rank) < 1.05 * least
    assert missed(gram, matrix, s, 107) > 4 * missed(ours, matrix, s, 107)


def test_a_large_unfolding_of_a_wide_spectrum_is_exact_to_float32():
    s = np.logspace(0, -6, 512)
    matrix = wide_spectrum(512, 4608, s)
    ours, values = left_singular(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(values, s, rtol=1e-5, atol=6e-7)
    for rank in (85, 256, 426):
        assert missed(ours, matrix, s, rank) < 1.02


def test_unfoldings_have_a_row_a_channel():
    kernel = np.arange(2.0 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    into, out = unfold_in(jnp.asarray(kernel)), unfold_out(jnp.asarray(kernel))
    assert into.shape == (4, 30) and out.shape == (5, 24)
    for channel in range(4):
        assert set(np.asarray(into[channel])) == set(kernel[:, :, channel].ravel())
    for channel in range(5):
        assert set(np.asarray(out[channel])) == set(kernel[..., channel].ravel())


def test_factors_that_do_not_fit_are_refused():
    x, kernel = np.ones((2, 6, 6, 4), np.float32), np.ones((3, 3, 4, 6), np.float32)
    two = ops.tucker2(kernel, rank_in=2, rank_out=2)
    low = ops.low_rank(kernel[:1, :1], rank=2)
    cases = [
        # Lengths of 1 would broadcast.
        (ops.tucker2_conv, x, two._replace(u_out=two.u_out[:, :1])),
        (ops.tucker2_conv, x, two._replace(u_in=two.u_in[:, :1])),
        (ops.tucker2_conv, x[..., :1], two),
        (ops.low_rank_conv, x, low._replace(right=low.right[:, :1])),
        (ops.low_rank_conv, x[..., :1], low),
    ]
    for apply, images, factors in cases:
        with pytest.raises(ValueError, match="`factors`"):
            apply(images, factors)
    with pytest.raises(ValueError, match="`factors`"):
        ops.tucker2_to_kernel(two._replace(u_out=two.u_out[:, :1]))
    with pytest.raises(ValueError, match="`factors`"):
        ops.low_rank_to_kernel(low._replace(left=low.left[:, :1]))
    with pytest.raises(ValueError, match="`groups`"):
        ops.low_rank_conv(x, low, groups=4)


@pytest.mark.parametrize("sides", [(5,), (2, 3, 2)])
def test_kernels_of_other_numbers_of_axes_are_numpys_projection(sides):
    kernel = normal(*sides, 4, 6)
    factors = ops.tucker2(kernel, rank_in=2, rank_out=3)
    flat = kernel.reshape(-1, 4, 6).astype(np.float64)
    u_in = np.linalg.svd(flat.transpose(1, 0, 2).reshape(4, -1))[0][:, :2]
    u_out = np.linalg.svd(flat.transpose(2, 0, 1).reshape(6, -1))[0][:, :3]
    p_in, p_out = u_in @ u_in.T, u_out @ u_out.T
    expected = np.einsum("sio,ij,ok->sjk", flat, p_in, p_out).reshape(kernel.shape)
    assert factors.core.shape == (*sides, 2, 3)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(ops.tucker2_to_kernel(factors), expected)  # float32
    # The factors convolve as the kernel that they stand for.
    count = len(sides)
    x = normal(2, *(6,) * count, 4)
    axes = "DHW"[:count]
    found = ops.tucker2_conv(x, factors, strides=2, padding=1)
    dense = jax.lax.conv_general_dilated(
        x,
        expected.astype(np.float32),
        (2,) * count,
        [(1, 1)] * count,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    close(found, dense)
    hooi = ops.tucker2(kernel, rank_in=2, rank_out=3, method="hooi")
    error = lambda f: np.sum((ops.tucker2_to_kernel(f) - kernel) ** 2)  # noqa: E731
    assert error(hooi) <= error(factors) * (1 + 1e-6)


@pytest.mark.parametrize("channels", [(3, 4), (4, 3)])
def test_groups_must_divide_both_numbers_of_channels(channels):
    c_in, c_out = channels
    x = normal(1, 5, 5, c_in)
    into, core, out = normal(c_in, 1), normal(3, 3, 1, 2), normal(c_out, 1)
    with pytest.raises(ValueError, match="`groups` .=2. must divide the channels"):
        ops.tucker2_conv(x, ops.Tucker2Factors(into, core, out), groups=2)
