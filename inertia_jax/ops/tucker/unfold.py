"""Convolution kernels as matrices: their unfoldings, singular vectors and ranks."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.precision import at_least_float32, precise_einsum

# What is NumPy's stays NumPy's: JAX would compile each reshape of each shape by itself.
AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def move_axis(array: AnyArray, source: int, destination: int) -> AnyArray:
    """Returns an array of the same library with an axis at another place."""
    library: Any = array.__array_namespace__()
    moved: AnyArray = library.moveaxis(array, source, destination)
    return moved


def max_ranks(kernel_shape: Sequence[int], *, groups: int = 1) -> tuple[int, int]:
    """Returns the largest (rank_in, rank_out) that a kernel's unfoldings can have.

    The shape is [*sides, c_in / groups, c_out]; the ranks are those of one group.
    """
    *sides, c_in, c_out = kernel_shape
    taps, c_out = math.prod(sides), c_out // groups
    return min(c_in, taps * c_out), min(c_out, taps * c_in)


@jax.jit
def left_singular(
    matrix: Float[Array, "m n"],
) -> tuple[Float[Array, "m k"], Float[Array, "k"]]:
    """Returns left singular vectors, k = min(m, n), and singular values, largest first.

    A wide matrix is replaced by its triangular factor: R^T has the same left singular
    vectors and values. So a 512 x 4608 unfolding becomes 512 x 512 without squaring its
    condition as the Gram matrix would.
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = jnp.linalg.qr(matrix.T, mode="r").T
    u, s, _ = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s


def leading_singular(matrix: Float[Array, "m n"], rank: int) -> Float[Array, "m rank"]:
    """Returns the leading left singular vectors, `rank` of them, at most m.

    A matrix with fewer columns has fewer singular vectors. They are completed by
    orthonormal columns, whose products with the matrix are zero.
    """
    u = left_singular(matrix)[0][:, :rank]
    if (found := u.shape[1]) == rank:
        return u
    # The derivative of a complete QR is unknown; that of this difference suffices.
    rest = jnp.linalg.qr(lax.stop_gradient(u), mode="complete")[0][:, found:rank]
    rest -= precise_einsum("mk,lk,lr->mr", u, u, rest)
    return jnp.concatenate([u, rest], axis=1)


def unfold_in(
    kernel: Float[AnyArray, "*sides c_in c_out"],
) -> Float[AnyArray, "c_in rest"]:
    """Returns the kernel as a matrix, with one row per input channel."""
    return move_axis(kernel, -2, 0).reshape(kernel.shape[-2], -1)


def unfold_out(
    kernel: Float[AnyArray, "*sides c_in c_out"],
) -> Float[AnyArray, "c_out rest"]:
    """Returns the kernel as a matrix, with one row per output channel."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def split_groups(
    kernel: Float[AnyArray, "*sides c_in c_out"], groups: int
) -> Float[AnyArray, "g *sides c_in c_out_group"]:
    """Returns each group's kernel."""
    shape = (*kernel.shape[:-1], groups, kernel.shape[-1] // groups)
    return move_axis(kernel.reshape(shape), -2, 0)


def as_wide_kernel(kernel: Float[ArrayLike, "*sides c_in c_out"], groups: int) -> Array:
    """Returns the kernel in float32 at least.

    Raises:
        ValueError: It has no channels or taps, or cannot have as many groups.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2 or 0 in kernel.shape[:-2]:
        raise ValueError(
            f"`kernel` (shape {kernel.shape}) must be [*sides, c_in, c_out], with "
            f"sides >= 1."
        )
    if groups < 1 or kernel.shape[-1] % groups:
        raise ValueError(
            f"`groups` (={groups}) must divide {kernel.shape[-1]}, the output channels."
        )
    return kernel.astype(at_least_float32(kernel.dtype))


def check_rank(name: str, rank: int, most: int) -> None:
    """Raises ValueError if `rank` is not in [1, most]."""
    if not 1 <= rank <= most:
        raise ValueError(f"`{name}` (={rank}) must be in [1, {most}].")
