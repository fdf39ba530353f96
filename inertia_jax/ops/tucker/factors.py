"""The factors of a factorised kernel, and the convolutions that they are."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.conv.conv import MixingForm, mix_channels
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.conv.replaced import is_replaced
from inertia_jax.ops.tucker.unfold import AnyArray, move_axis


class Tucker2Factors(NamedTuple):
    """A kernel as `core` with a factor on each side; groups lie one below the other.

    Attributes:
        u_in: Factor of the input channels, [c_in, r_in], with rows by group.
        core: Kernel of a convolution of `groups`, [*sides, r_in, groups * r_out], with
            a side for each axis of an image.
        u_out: Factor of the output channels, [c_out, r_out], with rows by group.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))
        >>> u_in, core, u_out = ij.ops.tucker2(kernel, rank_in=4, rank_out=3)
        >>> core.shape
        (3, 3, 4, 3)
    """

    u_in: Float[Array, "c_in r_in"]
    core: Float[Array, "*sides r_in r_out_groups"]
    u_out: Float[Array, "c_out r_out"]


class LowRankFactors(NamedTuple):
    """A kernel of one tap as a product of two; groups lie one below the other.

    Attributes:
        left: Factor of the input channels, [c_in, r], with rows by group.
        right: Factor of the output channels, [c_out, r], with rows by group.

    Example:
        >>> factors = ij.ops.LowRankFactors(
        ...     left=jnp.ones((8, 2)), right=jnp.ones((6, 2))
        ... )
        >>> ij.ops.low_rank_to_kernel(factors, num_axes=0).shape
        (8, 6)
    """

    left: Float[Array, "c_in r"]
    right: Float[Array, "c_out r"]


def check_factors(
    factors: Tucker2Factors | LowRankFactors,
    *,
    groups: int,
    channels: int | None = None,
) -> None:
    """Raises ValueError unless the factors fit each other, and an input's channels."""
    shapes = {name: np.shape(factor) for name, factor in factors._asdict().items()}
    found = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items())
    first, *between, last = (len(shape) for shape in shapes.values())
    if (first, last) != (2, 2) or min(between, default=2) < 2:
        raise ValueError(
            f"`factors` ({found}) must be matrices, but for `core` [*sides, r_in, "
            f"r_out]."
        )
    (c_in, rank_in), *cores, (c_out, rank_out) = shapes.values()
    inner = cores[0][-2:] if cores else (rank_out, groups * rank_out)
    if inner != (rank_in, groups * rank_out):
        raise ValueError(
            f"`factors` ({found}) must have the same ranks where they meet, with "
            f"{groups} groups."
        )
    if groups < 1 or c_in % groups or c_out % groups:
        raise ValueError(f"`groups` (={groups}) must divide the channels of {found}.")
    if channels is not None and channels != c_in:
        raise ValueError(
            f"`factors` ({found}) must take {channels} channels, as `x` has."
        )


def pointwise(
    x: Float[Array, "*batch c_in"],
    kernel: Float[Array, "c_in_group c_out"],
    *,
    groups: int = 1,
    precision: Any = None,
    on_tpu: MixingForm = "convolution",
) -> Float[Array, "*batch c_out"]:
    """Applies a convolution of one tap, as `mix_channels` multiplies.

    The kernel comes without the axes of its sides, [c_in / groups, c_out].
    """
    if groups == 1:
        return mix_channels(x, kernel, precision=precision, on_tpu=on_tpu)
    x = x.reshape(*x.shape[:-1], groups, -1)
    kernel = kernel.reshape(kernel.shape[0], groups, -1)
    y = jnp.einsum("...gi,igo->...go", x, kernel, precision=precision)
    return y.reshape(*y.shape[:-2], -1)


def pointwise_conv(
    x: Float[Array, "*batch c_in"],
    kernel: Any,
    *,
    groups: int = 1,
    precision: Any = None,
    on_tpu: MixingForm = "convolution",
) -> Float[Array, "*batch c_out"]:
    """Applies a 1x1 convolution, as layers do: as a product, unless JAX's is replaced.

    The kernel comes with its spatial axes, [1, 1, c_in / groups, c_out]; that of a
    linear layer has none. `on_tpu` is as in `mix_channels`.
    """
    if not is_replaced():
        matrix = kernel.reshape(kernel.shape[-2:])
        return pointwise(x, matrix, groups=groups, precision=precision, on_tpu=on_tpu)
    spatial = kernel.ndim - 2
    if not spatial:
        over = (((x.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(x, kernel, over, precision=precision)
    axes = "DHW"[-spatial:]
    y = conv_for_linen(
        x.reshape(-1, *x.shape[-spatial - 1 :]),
        kernel,
        (1,) * spatial,
        "VALID",
        rhs_dilation=(1,) * spatial,
        feature_group_count=groups,
        precision=precision,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    return y.reshape(*x.shape[:-1], -1)


def factor_kernels(
    factors: Tucker2Factors | LowRankFactors, *, groups: int = 1, num_axes: int = 2
) -> tuple[Array | np.ndarray, ...]:
    """Returns the kernels [*sides, c_in / groups, c_out] to apply one after another.

    NumPy factors give NumPy arrays, for which nothing is compiled.

    Args:
        factors: The factors.
        groups: Groups of the convolution.
        num_axes: The number of an image's axes, where no core says it.
    """
    into, *core, out = factors
    ones = (1,) * (core[0].ndim - 2 if core else num_axes)
    first = into.reshape(*ones, *into.shape)
    if groups > 1:
        stacked = into.reshape(groups, -1, into.shape[1])
        first = move_axis(stacked, 0, 1).reshape(*ones, stacked.shape[1], -1)
    return first, *core, out.T.reshape(*ones, *out.T.shape)


def as_matrix(
    kernel: Float[AnyArray, "*ones c_in c_out"],
) -> Float[AnyArray, "c_in c_out"]:
    """Returns a kernel of one tap without the axes of its sides."""
    return kernel.reshape(kernel.shape[-2:])


def stack_groups(
    kernel: Float[AnyArray, "*ones c_in_group r_groups"], groups: int
) -> Float[AnyArray, "c_in r"]:
    """Returns a grouped kernel of one tap as a factor: its rows are group by group."""
    matrix = as_matrix(kernel)
    matrix = matrix.reshape(matrix.shape[0], groups, -1)
    return move_axis(matrix, 1, 0).reshape(groups * matrix.shape[0], -1)
