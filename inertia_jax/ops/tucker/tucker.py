"""Tucker-2 factorisation of convolution kernels: HOSVD, HOOI, and their application."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.any_axes import conv
from inertia_jax.ops.conv.conv import Padding
from inertia_jax.ops.precision import precise_einsum
from inertia_jax.ops.tucker.factors import (
    Tucker2Factors,
    as_matrix,
    check_factors,
    factor_kernels,
    pointwise,
)
from inertia_jax.ops.tucker.unfold import (
    as_wide_kernel,
    check_rank,
    leading_singular,
    max_ranks,
    split_groups,
    unfold_in,
    unfold_out,
)

Method = Literal["hosvd", "hooi"]


def tucker2(
    kernel: Float[ArrayLike, "*sides c_in c_out"],
    *,
    rank_in: int,
    rank_out: int,
    method: Method = "hosvd",
    groups: int = 1,
    num_iterations: int = 100,
    tolerance: float = 1e-5,
) -> Tucker2Factors:
    """Factorises a kernel: K = core x_in U_in x_out U_out, truncated.

    U_in holds the leading left singular vectors of the unfolding along the input
    channels, U_out those along the output channels, and the core is the kernel
    multiplied by both transposes. `hooi` then improves each factor in turn, given the
    other, until the relative error ||K - K'|| / ||K|| changes by less than `tolerance`;
    it is never worse. Only `hosvd` has reverse-mode gradients, since the number of
    iterations of `hooi` is not known beforehand.

    Args:
        kernel: Kernel, [kh, kw, c_in / groups, c_out], or with another number of sides,
            one for each axis of an image; narrower types are raised to float32.
        rank_in: Rank of the input channels, in [1, c_in / groups]; lowered to
            `max_ranks`.
        rank_out: Rank of the output channels, in [1, c_out / groups]; lowered to
            `max_ranks`.
        method: `hosvd`, which takes one pass, or `hooi`, which iterates.
        groups: Groups of the convolution; each is factorised by itself, to these ranks.
        num_iterations: Most iterations of `hooi`, each of both factors.
        tolerance: Change of the relative error below which `hooi` stops.

    Returns:
        The factors; `u_in` and `u_out` have orthonormal columns in each group.

    Raises:
        ValueError: A rank is outside its range, the kernel has no channels, the method
            is unknown, or the groups do not divide the output channels.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))
        >>> factors = ij.ops.tucker2(kernel, rank_in=4, rank_out=3)
        >>> [factor.shape for factor in factors]
        [(8, 4), (3, 3, 4, 3), (6, 3)]

    References:
        Tucker, 1966, https://doi.org/10.1007/BF02289464
        De Lathauwer et al., 2000, https://doi.org/10.1137/S0895479898346995 (HOOI)
        Kim et al., 2016, https://arxiv.org/abs/1511.06530, section 3.1
    """
    kernel = as_wide_kernel(kernel, groups)
    check_rank("rank_in", rank_in, kernel.shape[-2])
    check_rank("rank_out", rank_out, kernel.shape[-1] // groups)
    if method not in ("hosvd", "hooi"):
        raise ValueError(f"`method` (={method!r}) must be hosvd or hooi.")
    most_in, most_out = max_ranks(kernel.shape, groups=groups)
    return _tucker2(
        kernel,
        tolerance,
        rank_in=min(rank_in, most_in),
        rank_out=min(rank_out, most_out),
        groups=groups,
        num_iterations=num_iterations if method == "hooi" else 0,
    )


@functools.partial(
    jax.jit, static_argnames=("rank_in", "rank_out", "groups", "num_iterations")
)
def _tucker2(
    kernel: Array,
    tolerance: ArrayLike,
    *,
    rank_in: int,
    rank_out: int,
    groups: int,
    num_iterations: int,
) -> Tucker2Factors:
    def one_group(kernel: Array) -> Tucker2Factors:
        u_in = leading_singular(unfold_in(kernel), rank_in)
        u_out = leading_singular(unfold_out(kernel), rank_out)
        if num_iterations:
            u_in, u_out = _hooi(kernel, u_in, u_out, num_iterations, tolerance)
        core = precise_einsum("...io,ir,os->...rs", kernel, u_in, u_out)
        return Tucker2Factors(u_in, core, u_out)

    if groups == 1:  # A loop of one takes three times as long to compile.
        return one_group(kernel)
    u_in, core, u_out = lax.map(one_group, split_groups(kernel, groups))
    core = jnp.moveaxis(core, 0, -2)
    return Tucker2Factors(
        u_in.reshape(-1, u_in.shape[2]),
        core.reshape(*core.shape[:-2], -1),
        u_out.reshape(-1, u_out.shape[2]),
    )


def _hooi(
    kernel: Array, u_in: Array, u_out: Array, num_iterations: int, tolerance: ArrayLike
) -> tuple[Array, Array]:
    """Improves both factors in turn; the error can rise by rounding alone."""
    total = jnp.sum(kernel**2)
    rank_in, rank_out = u_in.shape[1], u_out.shape[1]

    def best_in(u_out: Array) -> Array:
        projection = precise_einsum("...io,os->...is", kernel, u_out)
        return leading_singular(unfold_in(projection), rank_in)

    def best_out(u_in: Array) -> Array:
        projection = precise_einsum("...io,ir->...ro", kernel, u_in)
        return leading_singular(unfold_out(projection), rank_out)

    def relative_error(u_in: Array, u_out: Array) -> Array:
        # ||K||^2 - ||core||^2 would cancel at high ranks; the difference does not.
        core = precise_einsum("...io,ir,os->...rs", kernel, u_in, u_out)
        again = precise_einsum("...rs,ir,os->...io", core, u_in, u_out)
        missed = jnp.sum((kernel - again) ** 2)
        return jnp.sqrt(missed / jnp.where(total > 0, total, 1))

    def goes_on(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        step, _, _, error, before = carry
        return (step < num_iterations) & (before - error > tolerance)

    def improve(
        carry: tuple[Array, Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array, Array]:
        step, u_in, u_out, error, _ = carry
        new_out = best_out(u_in)
        new_in = best_in(new_out)
        new_error = relative_error(new_in, new_out)
        better = new_error < error
        return (
            step + 1,
            jnp.where(better, new_in, u_in),
            jnp.where(better, new_out, u_out),
            jnp.where(better, new_error, error),
            error,
        )

    if rank_in >= math.prod(kernel.shape[:-2]) * rank_out:
        # U_in can hold all that U_out leaves, so that HOSVD's U_out is the best. Where
        # U_out can hold all that U_in leaves, the first iteration finds it.
        u_in = best_in(u_out)
    start = relative_error(u_in, u_out)
    first = (jnp.int32(0), u_in, u_out, start, jnp.full_like(start, jnp.inf))
    _, u_in, u_out, _, _ = lax.while_loop(goes_on, improve, first)
    return u_in, u_out


def tucker2_to_kernel(
    factors: Tucker2Factors, *, groups: int = 1
) -> Float[Array, "*sides c_in c_out"]:
    """Returns the kernel that the factors stand for.

    Args:
        factors: Factors, as `tucker2` returns them, or trained since.
        groups: Groups of the convolution.

    Raises:
        ValueError: The factors do not fit each other.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))
        >>> factors = ij.ops.tucker2(kernel, rank_in=8, rank_out=6)
        >>> jnp.allclose(ij.ops.tucker2_to_kernel(factors), kernel, atol=1e-5).item()
        True
    """
    check_factors(factors, groups=groups)
    return _tucker2_to_kernel(factors, groups)


@functools.partial(jax.jit, static_argnums=1)
def _tucker2_to_kernel(factors: Tucker2Factors, groups: int) -> Array:
    u_in, core, u_out = factors
    core = split_groups(core, groups)
    u_in = u_in.reshape(groups, -1, u_in.shape[1])
    u_out = u_out.reshape(groups, -1, u_out.shape[1])
    kernel = precise_einsum("g...rs,gir,gos->...igo", core, u_in, u_out)
    return kernel.reshape(*kernel.shape[:-2], -1)


def tucker2_conv(
    x: Float[ArrayLike, "n *image c_in"],
    factors: Tucker2Factors,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "n *out c_out"]:
    """Convolves images with a factorised kernel: 1x1, core, 1x1.

    Args:
        x: Images, with as many axes as the core has sides.
        factors: Factors, as `tucker2` returns them.
        strides: Strides of the factorised convolution, which the core has.
        padding: Padding of the factorised convolution, as `conv2d` takes it, with a
            pair for each axis.
        dilation: Dilation of the factorised convolution.
        groups: Groups of the factorised convolution.

    Returns:
        The output map, in the type that `x` and the factors promote to.

    Raises:
        ValueError: The factors do not fit each other or `x`, or the padding is bad.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 6))
        >>> factors = ij.ops.tucker2(kernel, rank_in=1, rank_out=3, method="hooi")
        >>> ij.ops.tucker2_conv(images, factors, strides=2).shape
        (16, 14, 14, 6)
    """
    x = jnp.asarray(x)
    check_factors(factors, groups=groups, channels=x.shape[-1])
    factors = Tucker2Factors(*map(jnp.asarray, factors))
    first, core, last = map(jnp.asarray, factor_kernels(factors, groups=groups))
    x = pointwise(x, as_matrix(first), groups=groups)
    x = conv(
        x, core, strides=strides, padding=padding, dilation=dilation, groups=groups
    )
    return pointwise(x, as_matrix(last), groups=groups)
