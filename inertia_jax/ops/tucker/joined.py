"""A core and its last factor in training: two convolutions, or one on a TPU."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import Array
from jaxtyping import Float

from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.precision import at_least_float32, precise_einsum
from inertia_jax.ops.tucker.factors import pointwise_conv

# For each pixel, on v5e: four matrix units multiply blocks of 128 x 128, and XLA counts
# ten cycles for 1,024 numbers that a convolution writes. A step of a layer of 64
# features with rank 24, at [128,32,32,64], takes 0.72 million cycles apart and 0.64
# joined, by XLA's estimate; one of 256 with rank 96, at [128,8,8,256], 0.21 and 0.23.
_BLOCK = 128
_BLOCKS_A_CYCLE = 4
_FEATURES_A_CYCLE = 100


def core_and_last(
    convolve: Callable[[Array, Array], Array],
    x: Float[Array, "n *image r_in"],
    core: Float[Array, "*sides r_in_group r_out"],
    last: Float[Array, "*ones r_out_group c_out"],
    *,
    groups: int = 1,
    precision: Any = None,
) -> Float[Array, "n *out c_out"]:
    """Convolves with a core, and then mixes the channels by the last factor.

    On TPU, both are one convolution with their product, where it is trained quicker.

    Args:
        convolve: The convolution, a function of images and a kernel.
        x: Images.
        core: The kernel of the first convolution.
        last: That of the second, of one tap.
        groups: Groups of both.
        precision: The precision of the second, as `jax.lax.dot_general` takes it.
    """

    def apart(x: Array, core: Array, last: Array) -> Array:
        y = convolve(x, core)
        return pointwise_conv(y, last, groups=groups, precision=precision)

    def joined(x: Array, core: Array, last: Array) -> Array:
        wide = at_least_float32(core.dtype)
        matrix = last.reshape(last.shape[-2:]).astype(wide)
        kernel = precise_einsum("...rs,so->...ro", core.astype(wide), matrix)
        return convolve(x, kernel.astype(core.dtype))

    pays = x.ndim == 4 and groups == 1 and joining_pays(core.shape, last.shape)
    return by_platform(x, core, last, tpu=joined if pays else None, default=apart)


def joining_pays(core_shape: Sequence[int], last_shape: Sequence[int]) -> bool:
    """Whether a TPU takes no longer for the product than for the last factor alone."""
    *sides, rank_in, rank_out = core_shape
    features = last_shape[-1]
    both = _cycles_a_pixel(math.prod(sides) * rank_in, features)
    return both <= _cycles_a_pixel(rank_out, features)


def _cycles_a_pixel(terms: int, features: int) -> float:
    """Returns the cycles of a convolution whose features are sums of so many terms.

    It is bounded by its products, block by block, or by writing its output.
    """
    blocks = math.ceil(terms / _BLOCK) * math.ceil(features / _BLOCK)
    return max(blocks / _BLOCKS_A_CYCLE, features / _FEATURES_A_CYCLE)
