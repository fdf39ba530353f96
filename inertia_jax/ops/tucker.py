"""Tucker-2 factorisation of convolution kernels: HOSVD, HOOI, and their application."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv import Padding, conv2d, pair

Method = Literal["hosvd", "hooi"]

# On GPU and TPU the default would round factors to TF32 or bfloat16.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Tucker2Factors(NamedTuple):
    """A kernel as `core` with a factor on each side; of groups, one below the other.

    Attributes:
        u_in: [c_in, r_in]; of `groups`, rows of group after group.
        core: [kh, kw, r_in, groups * r_out], a convolution kernel of as many groups.
        u_out: [c_out, r_out]; rows of group after group.
    """

    u_in: Float[Array, "c_in r_in"]
    core: Float[Array, "kh kw r_in r_out_groups"]
    u_out: Float[Array, "c_out r_out"]


class LowRankFactors(NamedTuple):
    """A 1x1 kernel as a product of two; of groups, one below the other.

    Attributes:
        left: [c_in, r]; of `groups`, rows of group after group.
        right: [c_out, r], transposed so that groups stack alike.
    """

    left: Float[Array, "c_in r"]
    right: Float[Array, "c_out r"]


def max_ranks(kernel_shape: Sequence[int], *, groups: int = 1) -> tuple[int, int]:
    """Returns the largest (rank_in, rank_out) that a kernel's unfoldings can have.

    Args:
        kernel_shape: [kh, kw, c_in / groups, c_out].
        groups: Of the convolution; ranks are those of one group.
    """
    kh, kw, c_in, c_out = kernel_shape
    c_out //= groups
    return min(c_in, kh * kw * c_out), min(c_out, kh * kw * c_in)


def left_singular(
    matrix: Float[Array, "m n"],
) -> tuple[Float[Array, "m k"], Float[Array, "k"]]:
    """Returns left singular vectors, k = min(m, n), and singular values, largest first.

    Of a wide matrix by its triangular factor: the singular values of R^T are those of
    the matrix, and a 512 x 4608 unfolding becomes 512 x 512 without squaring its
    condition as the Gram matrix would.
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = jnp.linalg.qr(matrix.T, mode="r").T
    u, s, _ = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s


def unfold_in(
    kernel: Float[ArrayLike, "kh kw c_in c_out"],
) -> Float[Array, "c_in rest"]:
    """Returns the kernel as a matrix, a row an input channel."""
    kernel = jnp.asarray(kernel)
    return jnp.moveaxis(kernel, 2, 0).reshape(kernel.shape[2], -1)


def unfold_out(
    kernel: Float[ArrayLike, "kh kw c_in c_out"],
) -> Float[Array, "c_out rest"]:
    """Returns the kernel as a matrix, a row an output channel."""
    kernel = jnp.asarray(kernel)
    return kernel.reshape(-1, kernel.shape[3]).T


def split_groups(
    kernel: Float[ArrayLike, "kh kw c_in c_out"], groups: int
) -> Float[Array, "g kh kw c_in c_out_group"]:
    """Returns each group's kernel."""
    kernel = jnp.asarray(kernel)
    shape = (*kernel.shape[:3], groups, kernel.shape[3] // groups)
    return jnp.moveaxis(kernel.reshape(shape), 3, 0)


def tucker2(
    kernel: Float[ArrayLike, "kh kw c_in c_out"],
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
    it is never worse.

    Args:
        kernel: [kh, kw, c_in / groups, c_out]; types below float32 are raised to it.
        rank_in: In [1, c_in / groups]; lowered to `max_ranks`.
        rank_out: In [1, c_out / groups]; likewise.
        method: `hosvd`, one pass, or `hooi`, iterated.
        groups: Of the convolution; each is factorised by itself, with these ranks.
        num_iterations: Most iterations of `hooi`, each of both factors.
        tolerance: Of `hooi`.

    Returns:
        The factors; `u_in` and `u_out` have orthonormal columns in each group.

    Raises:
        ValueError: A rank outside its range, a kernel that is not four-dimensional, an
            unknown method, or groups that do not divide the output channels.

    References:
        Tucker, 1966, https://doi.org/10.1007/BF02289464
        De Lathauwer et al., 2000, https://doi.org/10.1137/S0895479898346995 (HOOI)
        Kim et al., 2016, https://arxiv.org/abs/1511.06530, section 3.1
    """
    kernel = _checked(kernel, groups)
    _check_rank("rank_in", rank_in, kernel.shape[2])
    _check_rank("rank_out", rank_out, kernel.shape[3] // groups)
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


def _checked(kernel: Float[ArrayLike, "kh kw c_in c_out"], groups: int) -> Array:
    kernel = jnp.asarray(kernel)
    if kernel.ndim != 4:
        raise ValueError(
            f"`kernel` (shape {kernel.shape}) must be [kh, kw, c_in, c_out]."
        )
    if groups < 1 or kernel.shape[3] % groups:
        raise ValueError(
            f"`groups` (={groups}) must divide {kernel.shape[3]}, the output channels."
        )
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))


def _check_rank(name: str, rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"`{name}` (={rank}) must be in [1, {most}].")


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
        u_in = left_singular(unfold_in(kernel))[0][:, :rank_in]
        u_out = left_singular(unfold_out(kernel))[0][:, :rank_out]
        if num_iterations:
            u_in, u_out = _hooi(kernel, u_in, u_out, num_iterations, tolerance)
        core = _einsum("hwio,ir,os->hwrs", kernel, u_in, u_out)
        return Tucker2Factors(u_in, core, u_out)

    if groups == 1:  # as a loop of one, it takes three times as long to compile
        return one_group(kernel)
    return _stacked(lax.map(one_group, split_groups(kernel, groups)))


def _stacked(factors: Tucker2Factors) -> Tucker2Factors:
    """Turns factors of groups [g, ...] into those of a grouped convolution."""
    u_in, core, u_out = factors
    core = jnp.moveaxis(core, 0, 3)
    return Tucker2Factors(
        u_in.reshape(-1, u_in.shape[2]),
        core.reshape(*core.shape[:3], -1),
        u_out.reshape(-1, u_out.shape[2]),
    )


def _hooi(
    kernel: Array, u_in: Array, u_out: Array, num_iterations: int, tolerance: ArrayLike
) -> tuple[Array, Array]:
    """Improves both factors in turn; the error cannot rise but by rounding."""
    total = jnp.sum(kernel**2)

    def relative_error(u_in: Array, u_out: Array) -> Array:
        # The difference, not ||K||^2 - ||core||^2, which cancels at high ranks.
        core = _einsum("hwio,ir,os->hwrs", kernel, u_in, u_out)
        again = _einsum("hwrs,ir,os->hwio", core, u_in, u_out)
        missed = jnp.sum((kernel - again) ** 2)
        return jnp.sqrt(missed / jnp.where(total > 0, total, 1))

    def goes_on(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        step, _, _, error, before = carry
        return (step < num_iterations) & (before - error > tolerance)

    def improve(
        carry: tuple[Array, Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array, Array]:
        step, u_in, u_out, error, _ = carry
        seen = _einsum("hwio,ir->hwro", kernel, u_in)
        new_out = left_singular(unfold_out(seen))[0][:, : u_out.shape[1]]
        seen = _einsum("hwio,os->hwis", kernel, new_out)
        new_in = left_singular(unfold_in(seen))[0][:, : u_in.shape[1]]
        new_error = relative_error(new_in, new_out)
        better = new_error < error
        return (
            step + 1,
            jnp.where(better, new_in, u_in),
            jnp.where(better, new_out, u_out),
            jnp.where(better, new_error, error),
            error,
        )

    start = relative_error(u_in, u_out)
    first = (jnp.int32(0), u_in, u_out, start, jnp.full_like(start, jnp.inf))
    _, u_in, u_out, _, _ = lax.while_loop(goes_on, improve, first)
    return u_in, u_out


def tucker2_to_kernel(
    factors: Tucker2Factors, *, groups: int = 1
) -> Float[Array, "kh kw c_in c_out"]:
    """Returns the kernel that the factors stand for.

    Args:
        factors: As `tucker2` gives them, or trained since.
        groups: Of the convolution.
    """
    u_in, core, u_out = map(jnp.asarray, factors)
    core = split_groups(core, groups)
    u_in = u_in.reshape(groups, -1, u_in.shape[1])
    u_out = u_out.reshape(groups, -1, u_out.shape[1])
    kernel = _einsum("ghwrs,gir,gos->hwigo", core, u_in, u_out)
    return kernel.reshape(*kernel.shape[:3], -1)


def pointwise(
    x: Float[Array, "*batch c_in"],
    kernel: Float[Array, "c_in_group c_out"],
    *,
    groups: int = 1,
) -> Float[Array, "*batch c_out"]:
    """Applies a 1x1 convolution, as a product of matrices.

    Args:
        x: Images, or any array with channels last.
        kernel: [c_in / groups, c_out], as a 1x1 kernel without its first two axes.
        groups: Of channels that do not mix.
    """
    if groups == 1:
        return jnp.einsum("...i,io->...o", x, kernel)
    x = x.reshape(*x.shape[:-1], groups, -1)
    kernel = kernel.reshape(kernel.shape[0], groups, -1)
    y = jnp.einsum("...gi,igo->...go", x, kernel)
    return y.reshape(*y.shape[:-2], -1)


def factor_kernels(
    factors: Tucker2Factors | LowRankFactors, *, groups: int = 1
) -> tuple[Any, ...]:
    """Returns the kernels [kh, kw, c_in / groups, c_out] to apply one after another.

    Of NumPy's factors, NumPy's arrays, but for the first of `groups`.
    """
    into, out = factors[0], factors[-1]
    first = into[None, None]
    if groups > 1:
        stacked = into.reshape(groups, -1, into.shape[1])
        first = jnp.moveaxis(stacked, 0, 1).reshape(1, 1, stacked.shape[1], -1)
    return first, *factors[1:-1], out.T[None, None]


def tucker2_conv(
    x: Float[ArrayLike, "n h w c_in"],
    factors: Tucker2Factors,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves images with a factorised kernel: 1x1, core, 1x1.

    Args:
        x: Images.
        factors: As `tucker2` gives them.
        strides: Of the core, as of the convolution it comes from.
        padding: Likewise; see `conv2d`.
        dilation: Likewise.
        groups: Likewise.

    Returns:
        The output map, in the type that `x` and the factors promote to.

    Raises:
        ValueError: Channels of `x` and `u_in` do not match, or a bad padding.
    """
    x = jnp.asarray(x)
    u_in, core, u_out = map(jnp.asarray, factors)
    if x.shape[-1] != u_in.shape[0]:
        raise ValueError(
            f"`factors.u_in` (shape {u_in.shape}) must take {x.shape[-1]} channels, as "
            f"`x` (shape {x.shape}) has."
        )
    first, core, last = factor_kernels(Tucker2Factors(u_in, core, u_out), groups=groups)
    x = pointwise(x, first[0, 0], groups=groups)
    x = conv2d(
        x, core, strides=strides, padding=padding, dilation=dilation, groups=groups
    )
    return pointwise(x, last[0, 0], groups=groups)


def low_rank(
    kernel: Float[ArrayLike, "1 1 c_in c_out"], *, rank: int, groups: int = 1
) -> LowRankFactors:
    """Factorises a 1x1 kernel into two: K = left right^T, truncated.

    The singular values are split evenly, by their square roots, so that in training
    neither factor moves faster than the other.

    Args:
        kernel: [1, 1, c_in / groups, c_out].
        rank: In [1, min(c_in, c_out) / groups].
        groups: Of the convolution; each is factorised by itself.

    Raises:
        ValueError: A rank outside its range, or a kernel that is not 1x1.

    References:
        Eckart and Young, 1936, https://doi.org/10.1007/BF02288367
    """
    kernel = _checked(kernel, groups)
    if kernel.shape[:2] != (1, 1):
        raise ValueError(
            f"`kernel` (shape {kernel.shape}) must be [1, 1, c_in, c_out]."
        )
    _check_rank("rank", rank, min(kernel.shape[2], kernel.shape[3] // groups))
    return _low_rank(kernel, rank=rank, groups=groups)


@functools.partial(jax.jit, static_argnames=("rank", "groups"))
def _low_rank(kernel: Array, *, rank: int, groups: int) -> LowRankFactors:
    u, s, vt = jnp.linalg.svd(
        split_groups(kernel, groups)[:, 0, 0], full_matrices=False
    )
    root = jnp.sqrt(s[:, None, :rank])
    left = u[..., :rank] * root
    right = jnp.swapaxes(vt, 1, 2)[..., :rank] * root
    return LowRankFactors(left.reshape(-1, rank), right.reshape(-1, rank))


def low_rank_to_kernel(
    factors: LowRankFactors, *, groups: int = 1
) -> Float[Array, "1 1 c_in c_out"]:
    """Returns the 1x1 kernel that the factors stand for."""
    left, right = map(jnp.asarray, factors)
    left = left.reshape(groups, -1, left.shape[1])
    right = right.reshape(groups, -1, right.shape[1])
    kernel = _einsum("gir,gor->igo", left, right)
    return kernel.reshape(1, 1, kernel.shape[0], -1)


def low_rank_conv(
    x: Float[ArrayLike, "n h w c_in"],
    factors: LowRankFactors,
    *,
    strides: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves images with a factorised 1x1 kernel, without padding.

    Args:
        x: Images.
        factors: As `low_rank` gives them.
        strides: Distance between output positions, in pixels.
        groups: Of the convolution.
    """
    x = jnp.asarray(x)
    down, across = pair(strides)
    first, last = factor_kernels(factors, groups=groups)
    x = pointwise(x[:, ::down, ::across], first[0, 0], groups=groups)
    return pointwise(x, last[0, 0], groups=groups)
