"""The factorised convolutions as NNX modules, used like `nnx.Conv`."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from inertia_jax.layers.pointwise import check_groups
from inertia_jax.ops.conv.conv import per_axis
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.tucker.factors import pointwise_conv
from inertia_jax.ops.tucker.unfold import check_rank, max_ranks
from inertia_jax.plan.specs import LowRank, Tucker2


class QuickConv(nnx.Conv):
    """An `nnx.Conv` in the quickest form on CPU, in training mode also of gradients.

    Attributes:
        use_running_average: False in training mode, where it has reverse-mode gradients
            alone; `train()` and `eval()` of the network set it.
    """

    def __init__(
        self, *args: Any, use_running_average: bool = True, **kwargs: Any
    ) -> None:
        """Makes the convolution that `nnx.Conv` makes."""
        super().__init__(*args, **kwargs)
        self.use_running_average = use_running_average
        del self.conv_general_dilated  # which the method below would be hidden by

    def conv_general_dilated(  # type: ignore[override]  # an attribute of nnx.Conv
        self, *args: Any, **options: Any
    ) -> Array:
        return conv_for_linen(*args, train=not self.use_running_average, **options)


def conv_pointwise(
    x: Array,
    kernel: Any,
    *_: Any,
    feature_group_count: int,
    precision: Any,
    **__: Any,
) -> Array:
    """Multiplies channels, as the function that an `nnx.Conv` of 1x1 takes."""
    return pointwise_conv(x, kernel, groups=feature_group_count, precision=precision)


class Tucker2Conv(nnx.Module):
    """A Tucker-2 factorised convolution, used like `nnx.Conv` of two dimensions.

    Children: `u_in`, 1x1 from the input channels to `rank_in` a group; `core`, the
    convolution between the ranks, with these strides, padding and dilation; `u_out`,
    1x1 to the features, with the bias. In training mode it has reverse-mode gradients
    alone. Arguments that are not listed are those of `nnx.Conv`, for all three
    children; `inertia_jax.Tucker2Conv` is the same layer in Linen.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        kernel_size: Sides of the core, or one of a square one.
        rank_in: Channels before the core, of each group, in [1, in_features / groups],
            and at most what the kernel's unfolding can have (`max_ranks`).
        rank_out: Channels after the core, of each group, in [1, out_features / groups],
            and at most what the unfolding can have.
        use_running_average: Whether the layer is in evaluation mode, as `nnx.BatchNorm`
            has it; `train()` and `eval()` of the network set it.

    Raises:
        ValueError: A rank outside its range, or groups that do not divide the channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        rank_in: int,
        rank_out: int,
        padding: Any = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: Any = None,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the variables of the children from `rngs`."""
        groups = feature_group_count
        count = 2 if isinstance(kernel_size, int) else len(kernel_size)
        size = per_axis(kernel_size, "kernel_size", count=count, least=1)
        ones = (1,) * count
        check_groups(groups, in_features, out_features)
        most_in, most_out = max_ranks(
            (*size, in_features // groups, out_features), groups=groups
        )
        check_rank("rank_in", rank_in, most_in)
        check_rank("rank_out", rank_out, most_out)
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size, self.strides, self.padding = size, strides, padding
        self.kernel_dilation, self.feature_group_count = kernel_dilation, groups
        self.rank_in, self.rank_out = rank_in, rank_out
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
        self.u_in = nnx.Conv(
            in_features,
            groups * rank_in,
            ones,
            use_bias=False,
            conv_general_dilated=conv_pointwise,
            **common,
        )
        self.core = QuickConv(
            groups * rank_in,
            groups * rank_out,
            size,
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            use_bias=False,
            use_running_average=use_running_average,
            **common,
        )
        self.u_out = nnx.Conv(
            groups * rank_out,
            out_features,
            ones,
            use_bias=use_bias,
            bias_init=bias_init,
            conv_general_dilated=conv_pointwise,
            **common,
        )

    @property
    def spec(self) -> Tucker2:
        """The spec that a plan has for this layer."""
        return Tucker2(self.rank_in, self.rank_out)

    def __call__(
        self, inputs: Float[Array, "*image c_in"]
    ) -> Float[Array, "*out features"]:
        return self.u_out(self.core(self.u_in(inputs)))


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
        kernel_size: A 1 for each axis of an image.

    Raises:
        ValueError: A rank outside its range, a side that is not 1, or groups that do
            not divide the channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int | Sequence[int] | None = 1,
        *,
        rank: int,
        kernel_size: Sequence[int] = (1, 1),
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
        if {*kernel_size} != {1}:
            raise ValueError(
                f"`kernel_size` (={kernel_size}) must be a 1 for each axis."
            )
        self.kernel_size, self.kernel_dilation = tuple(kernel_size), 1
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
            tuple(kernel_size),
            strides,
            padding=padding,
            use_bias=False,
            conv_general_dilated=conv_for_linen,
            **common,
        )
        self.right = nnx.Conv(
            groups * rank,
            out_features,
            tuple(kernel_size),
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
        self, inputs: Float[Array, "*image c_in"]
    ) -> Float[Array, "*out features"]:
        return self.right(self.left(inputs))
