"""A convolution of one tap, or a linear layer, in two factors: NNX modules."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers.pointwise import check_groups
from inertia_jax.nnx.tucker import conv_pointwise
from inertia_jax.ops.conv.conv import filter_sides
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.tucker.unfold import check_rank
from inertia_jax.plan.specs import LowRank


class LowRankConv(nnx.Module):
    """A 1x1 convolution as two, used like `nnx.Conv`.

    Children: `left`, from the input channels to `rank` a group, with strides and
    padding; `right`, from there to the features, with the bias. Arguments that are not
    listed are those of `nnx.Conv`, for both children; `inertia_jax.LowRankConv` is the
    same layer in Linen.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        rank: Channels between the two, of each group, in [1, min(in_features,
            out_features) / groups].
        kernel_size: A 1 for each axis of an image; one 1 is for two axes.

    Raises:
        ValueError: A rank outside its range, a side that is not 1, or groups that do
            not divide the channels.

    Example:
        >>> from flax import nnx
        >>> layer = ij.nnx.LowRankConv(1, 8, rank=1, rngs=nnx.Rngs(0))
        >>> layer(images).shape
        (16, 28, 28, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int | Sequence[int] | None = 1,
        *,
        rank: int,
        kernel_size: int | Sequence[int] = (1, 1),
        padding: Any = "SAME",
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the variables of the children from `rngs`."""
        groups = feature_group_count
        check_groups(groups, in_features, out_features)
        check_rank("rank", rank, min(in_features, out_features) // groups)
        self.in_features, self.out_features = in_features, out_features
        size = filter_sides(kernel_size)
        if {*size} != {1}:
            raise ValueError(
                f"`kernel_size` (={kernel_size}) must be a 1 for each axis."
            )
        self.kernel_size, self.kernel_dilation = size, 1
        self.strides, self.padding = strides, padding
        self.feature_group_count, self.rank = groups, rank
        self.use_bias, self.precision = use_bias, precision
        self.dtype, self.param_dtype = dtype, param_dtype
        common: dict[str, Any] = {
            "feature_group_count": groups,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": kernel_init,
            "precision": precision,
            "rngs": rngs,
        }
        self.left = nnx.Conv(
            in_features,
            groups * rank,
            size,
            strides,
            padding=padding,
            use_bias=False,
            conv_general_dilated=conv_for_linen,
            **common,
        )
        self.right = nnx.Conv(
            groups * rank,
            out_features,
            size,
            use_bias=use_bias,
            bias_init=bias_init,
            conv_general_dilated=conv_pointwise,
            **common,
        )

    @property
    def spec(self) -> LowRank:
        """The spec that a plan has for this layer."""
        return LowRank(self.rank)

    def __call__(
        self, inputs: Float[ArrayLike, "*image c_in"]
    ) -> Float[Array, "*out features"]:
        return self.right(self.left(jnp.asarray(inputs)))


class LowRankDense(nnx.Module):
    """A linear layer as two, used like `nnx.Linear`.

    Children: `left`, from the inputs to `rank`; `right`, from there to the outputs,
    with the bias. Arguments that are not listed are those of `nnx.Linear`, for both.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        rank: Numbers between the two, in [1, min(in_features, out_features)].

    Raises:
        ValueError: A rank outside its range.

    Example:
        >>> from flax import nnx
        >>> layer = ij.nnx.LowRankDense(8, 10, rank=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape
        (3, 10)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the variables of the children from `rngs`."""
        check_rank("rank", rank, min(in_features, out_features))
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.use_bias, self.precision = rank, use_bias, precision
        self.dtype, self.param_dtype = dtype, param_dtype
        common: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": kernel_init,
            "precision": precision,
            "rngs": rngs,
        }
        self.left = nnx.Linear(in_features, rank, use_bias=False, **common)
        self.right = nnx.Linear(
            rank, out_features, use_bias=use_bias, bias_init=bias_init, **common
        )

    @property
    def spec(self) -> LowRank:
        """The spec that a plan has for this layer."""
        return LowRank(self.rank)

    def __call__(
        self, inputs: Float[ArrayLike, "*batch c_in"]
    ) -> Float[Array, "*batch features"]:
        return self.right(self.left(jnp.asarray(inputs)))
