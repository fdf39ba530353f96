"""Low-rank factorisation of kernels of one tap, and its application."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.conv import per_axis
from inertia_jax.ops.precision import precise_einsum
from inertia_jax.ops.tucker.factors import (
    LowRankFactors,
    as_matrix,
    check_factors,
    factor_kernels,
    pointwise,
)
from inertia_jax.ops.tucker.unfold import as_wide_kernel, check_rank, split_groups


def low_rank(
    kernel: Float[ArrayLike, "*ones c_in c_out"], *, rank: int, groups: int = 1
) -> LowRankFactors:
    """Factorises a kernel of one tap into two: K = left right^T, truncated.

    The singular values are split evenly, by their square roots, so that in training
    neither factor moves faster than the other.

    Args:
        kernel: Kernel, [1, 1, c_in / groups, c_out], with a 1 for each axis of an
            image; the matrix [c_in, c_out] of a linear layer has none.
        rank: Rank, in [1, min(c_in, c_out) / groups].
        groups: Groups of the convolution; each is factorised by itself.

    Raises:
        ValueError: The rank is outside its range, or the kernel has several taps.

    Example:
        >>> matrix = jax.random.normal(jax.random.key(0), (8, 6))
        >>> left, right = ij.ops.low_rank(matrix, rank=2)
        >>> left.shape, right.shape
        ((8, 2), (6, 2))

    References:
        Eckart and Young, 1936, https://doi.org/10.1007/BF02288367
    """
    kernel = as_wide_kernel(kernel, groups)
    if set(kernel.shape[:-2]) - {1}:
        raise ValueError(
            f"`kernel` (shape {kernel.shape}) must be [1, 1, c_in, c_out], with a 1 "
            f"for each axis of an image."
        )
    check_rank("rank", rank, min(kernel.shape[-2], kernel.shape[-1] // groups))
    return _low_rank(kernel, rank=rank, groups=groups)


@functools.partial(jax.jit, static_argnames=("rank", "groups"))
def _low_rank(kernel: Array, *, rank: int, groups: int) -> LowRankFactors:
    u, s, vt = jnp.linalg.svd(
        split_groups(as_matrix(kernel), groups), full_matrices=False
    )
    root = jnp.sqrt(s[:, None, :rank])
    left = u[..., :rank] * root
    right = jnp.swapaxes(vt, 1, 2)[..., :rank] * root
    return LowRankFactors(left.reshape(-1, rank), right.reshape(-1, rank))


def low_rank_to_kernel(
    factors: LowRankFactors, *, groups: int = 1, num_axes: int = 2
) -> Float[Array, "*ones c_in c_out"]:
    """Returns the kernel of one tap that the factors stand for.

    Args:
        factors: Factors, as `low_rank` returns them, or trained since.
        groups: Groups of the convolution.
        num_axes: The number of an image's axes; 0 for a linear layer's matrix.

    Raises:
        ValueError: The factors do not fit each other.

    Example:
        >>> matrix = jax.random.normal(jax.random.key(0), (8, 6))
        >>> factors = ij.ops.low_rank(matrix, rank=6)
        >>> again = ij.ops.low_rank_to_kernel(factors, num_axes=0)
        >>> jnp.allclose(again, matrix, atol=1e-5).item()
        True
    """
    check_factors(factors, groups=groups)
    return _low_rank_to_kernel(factors, groups, num_axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _low_rank_to_kernel(factors: LowRankFactors, groups: int, num_axes: int) -> Array:
    left, right = factors
    left = left.reshape(groups, -1, left.shape[1])
    right = right.reshape(groups, -1, right.shape[1])
    kernel = precise_einsum("gir,gor->igo", left, right)
    return kernel.reshape(*(1,) * num_axes, kernel.shape[0], -1)


def low_rank_conv(
    x: Float[ArrayLike, "n *image c_in"],
    factors: LowRankFactors,
    *,
    strides: int | Sequence[int] | None = 1,
    groups: int = 1,
) -> Float[Array, "n *out c_out"]:
    """Convolves images with a factorised kernel of one tap, without padding.

    Args:
        x: Images of any number of axes.
        factors: Factors, as `low_rank` returns them.
        strides: Distance between output positions, in pixels: one for all axes, or one
            each. None, as Flax has it, means 1.
        groups: Groups of the convolution.

    Raises:
        ValueError: The factors do not fit each other, or do not fit `x`.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (1, 1, 1, 6))
        >>> ij.ops.low_rank_conv(images, ij.ops.low_rank(kernel, rank=1)).shape
        (16, 28, 28, 6)
    """
    x = jnp.asarray(x)
    check_factors(factors, groups=groups, channels=x.shape[-1])
    strides = 1 if strides is None else strides
    steps = per_axis(strides, "strides", count=x.ndim - 2, least=1)
    kernels = map(jnp.asarray, factor_kernels(factors, groups=groups))
    first, last = map(as_matrix, kernels)
    x = x[:, *(slice(None, None, step) for step in steps)]
    return pointwise(pointwise(x, first, groups=groups), last, groups=groups)
