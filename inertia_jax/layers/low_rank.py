"""A convolution of one tap, or a linear layer, in two factors: Linen modules."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers.pointwise import Pointwise, check_groups
from inertia_jax.ops.conv.conv import filter_sides
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.tucker.unfold import check_rank


class LowRankConv(nn.Module):
    """A 1x1 convolution as two, used like `nn.Conv`.

    Children: `left`, from the input channels to `rank` a group, with strides and
    padding; `right`, from there to the features, with the bias. Attributes that are not
    listed are those of `nn.Conv`, for both children.

    Attributes:
        features: Output channels.
        rank: Channels between the two, of each group, in [1, min(c_in, features) /
            groups].
        strides: Strides of the first, as `nn.Conv` has them.
        padding: Padding of the first, as `nn.Conv` has it.
        feature_group_count: Groups of channels that do not mix, in both.
        kernel_size: A 1 for each axis of an image.

    Raises:
        ValueError: A rank outside its range, a side that is not 1, or groups that do
            not divide the channels.

    Example:
        >>> layer = ij.LowRankConv(4, rank=1)
        >>> outputs, first = layer.init_with_output(jax.random.key(0), images)
        >>> outputs.shape, sorted(first["params"])
        ((16, 28, 28, 4), ['left', 'right'])
    """

    features: int
    rank: int
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    precision: Any = None
    kernel_size: int | Sequence[int] = (1, 1)

    @nn.compact
    def __call__(
        self, inputs: Float[ArrayLike, "*image c_in"]
    ) -> Float[Array, "*out features"]:
        x = jnp.asarray(inputs)
        if {*self.sides} != {1}:
            raise ValueError(
                f"`kernel_size` (={self.kernel_size}) must be a 1 for each axis."
            )
        groups = self.feature_group_count
        check_groups(groups, x.shape[-1], self.features)
        check_rank("rank", self.rank, min(x.shape[-1], self.features) // groups)
        common: dict[str, Any] = {
            "feature_group_count": groups,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "precision": self.precision,
        }
        x = nn.Conv(
            groups * self.rank,
            self.sides,
            strides=self.strides,
            padding=self.padding,
            use_bias=False,
            conv_general_dilated=conv_for_linen,
            name="left",
            **common,
        )(x)
        return Pointwise(
            self.features,
            use_bias=self.use_bias,
            bias_init=self.bias_init,
            num_axes=len(self.sides),
            name="right",
            **common,
        )(x)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the filters, one for each axis of an image."""
        return filter_sides(self.kernel_size)


class LowRankDense(nn.Module):
    """A linear layer as two, used like `nn.Dense`.

    Children: `left`, from the inputs to `rank`; `right`, from there to the features,
    with the bias. Attributes that are not listed are those of `nn.Dense`, for both.

    Attributes:
        features: Outputs.
        rank: Numbers between the two, in [1, min(c_in, features)].

    Raises:
        ValueError: A rank outside its range.

    Example:
        >>> layer = ij.LowRankDense(10, rank=2)
        >>> outputs, first = layer.init_with_output(jax.random.key(0), jnp.ones((3, 8)))
        >>> outputs.shape, first["params"]["left"]["kernel"].shape
        ((3, 10), (8, 2))
    """

    features: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[ArrayLike, "*batch c_in"]
    ) -> Float[Array, "*batch features"]:
        x = jnp.asarray(inputs)
        check_rank("rank", self.rank, min(x.shape[-1], self.features))
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "precision": self.precision,
            "num_axes": 0,
        }
        x = Pointwise(self.rank, name="left", **common)(x)
        return Pointwise(
            self.features,
            use_bias=self.use_bias,
            bias_init=self.bias_init,
            name="right",
            **common,
        )(x)
