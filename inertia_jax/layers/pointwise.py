"""A convolution of one tap as a product of matrices."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from inertia_jax.ops.tucker.factors import pointwise_conv


class Pointwise(nn.Module):
    """A convolution of one tap, or a linear layer, as a product of matrices.

    Parameters: `kernel` [1, 1, c_in / feature_group_count, features], with a 1 for each
    axis of an image, and `bias`. Attributes that are not listed are those of `nn.Conv`.

    Attributes:
        num_axes: The number of an image's axes; 0 for a linear layer.
        multiply: The function of an image and a kernel that is applied.
    """

    features: int
    use_bias: bool = False
    feature_group_count: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    precision: Any = None
    num_axes: int = 2
    multiply: Any = pointwise_conv

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c_in"]) -> Float[Array, "*batch c_out"]:
        groups = self.feature_group_count
        ones = (1,) * self.num_axes
        shape = (*ones, x.shape[-1] // groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = self.multiply(
            jnp.asarray(x), kernel, groups=groups, precision=self.precision
        )
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def check_groups(groups: int, c_in: int, features: int) -> None:
    """Raises ValueError where groups do not divide the channels."""
    if groups < 1 or c_in % groups or features % groups:
        raise ValueError(
            f"`feature_group_count` (={groups}) must divide {c_in} input and "
            f"{features} output channels."
        )
