"""The Tucker-2 factorised convolution as an NNX module."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers.in_place import cannot_be_inertial
from inertia_jax.layers.pointwise import check_groups
from inertia_jax.nnx.inertial import InertialConv
from inertia_jax.ops.conv.conv import filter_sides
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.tucker.factors import pointwise_conv
from inertia_jax.ops.tucker.unfold import check_rank, max_ranks
from inertia_jax.plan.specs import Conv, Inertial, Tucker2, fields_as


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

    def conv_general_dilated(self, *args: Any, **options: Any) -> Array:
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
    """A Tucker-2 factorised convolution, used like `nnx.Conv`, of any number of axes.

    Children: `u_in`, 1x1 from the input channels to `rank_in` a group; `core`, the
    convolution between the ranks, with these strides, padding and dilation; `u_out`,
    1x1 to the features, with the bias. In training mode it has reverse-mode gradients
    alone. Arguments that are not listed are those of `nnx.Conv`, for all three
    children; `inertia_jax.Tucker2Conv` is the same layer in Linen.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        kernel_size: Sides of the core, one for each axis; one number is a square.
        rank_in: Channels before the core, of each group, in [1, in_features / groups],
            and at most what the kernel's unfolding can have (`max_ranks`).
        rank_out: Channels after the core, of each group, in [1, out_features / groups],
            and at most what the unfolding can have.
        core: A `Conv`, or, for images of two axes, an `Inertial` with the convolution's
            output grid.
        axis_name: Mesh axis of an inertial core, as `InertialConv` has it.
        use_running_average: Whether the layer is in evaluation mode, as `nnx.BatchNorm`
            has it; `train()` and `eval()` of the network set it.

    Raises:
        ValueError: A rank outside its range, or groups that do not divide the channels.

    Example:
        >>> from flax import nnx
        >>> layer = ij.nnx.Tucker2Conv(
        ...     1, 8, (3, 3), rank_in=1, rank_out=2, rngs=nnx.Rngs(0)
        ... )
        >>> layer(images).shape, layer.core.kernel.shape
        ((16, 28, 28, 8), (3, 3, 1, 2))
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
        core: Conv | Inertial = Conv(),  # noqa: B008  # nothing changes it
        axis_name: str | None = None,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the variables of the children from `rngs`."""
        groups = feature_group_count
        size = filter_sides(kernel_size)
        ones = (1,) * len(size)
        check_groups(groups, in_features, out_features)
        sides = (core.core_size,) * 2 if isinstance(core, Inertial) else size
        most_in, most_out = max_ranks(
            (*sides, in_features // groups, out_features), groups=groups
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
        inner = {
            "strides": strides,
            "padding": padding,
            "use_bias": False,
            "use_running_average": use_running_average,
        }
        self.core_spec, self.axis_name = core, axis_name
        self.core: QuickConv | InertialConv
        if isinstance(core, Inertial):
            place = nn.Conv(
                out_features,
                size,
                strides=strides,
                kernel_dilation=kernel_dilation,
                feature_group_count=groups,
                precision=precision,
                parent=None,
            )
            if reason := cannot_be_inertial(place, core):
                raise ValueError(
                    f"`core` (={core}) cannot stand in a layer that {reason}."
                )
            kept = ("dtype", "param_dtype", "kernel_init", "rngs")
            self.core = InertialConv(
                rank_in,
                rank_out,
                kernel_size=size,
                axis_name=axis_name,
                **inner,
                **{name: common[name] for name in kept},
                **fields_as(Inertial, core),
            )
        else:
            self.core = QuickConv(
                groups * rank_in,
                groups * rank_out,
                size,
                kernel_dilation=kernel_dilation,
                **inner,
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
        return Tucker2(self.rank_in, self.rank_out, self.core_spec)

    def __call__(
        self, inputs: Float[ArrayLike, "*image c_in"]
    ) -> Float[Array, "*out features"]:
        return self.u_out(self.core(self.u_in(jnp.asarray(inputs))))
