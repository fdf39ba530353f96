"""The Tucker-2 factorised convolution as a Linen module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.pointwise import Pointwise, check_groups
from inertia_jax.ops.conv.conv import MixingForm, filter_sides, pair
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.conv.replaced import is_replaced
from inertia_jax.ops.tucker.factors import pointwise_conv
from inertia_jax.ops.tucker.joined import core_and_last, joining_pays
from inertia_jax.ops.tucker.unfold import check_rank, max_ranks
from inertia_jax.plan.specs import Conv, Inertial


class _CoreCall(NamedTuple):
    """What a core is called with and returns."""

    convolve: Callable[[Array, Array], Array]
    x: Array
    kernel: Array
    y: Array


def _after(call: _CoreCall, y: Array, last: Array, **options: Any) -> Array:
    """Applies the last factor after a core, whose output `y` may not be needed."""
    del y
    return core_and_last(call.convolve, call.x, call.kernel, last, **options)


class Tucker2Conv(nn.Module):
    """A Tucker-2 factorised convolution, used like `nn.Conv`.

    Children: `u_in`, 1x1 from the input channels to `rank_in` a group; `core`, the
    convolution between the ranks, with these strides, padding and dilation; `u_out`,
    1x1 to the features, with the bias. Zero padding commutes with a 1x1 convolution
    without bias, so any padding that `nn.Conv` takes stays exact. Called with `train`,
    it has reverse-mode gradients alone. Attributes that are not listed are those of
    `nn.Conv`, for all three children.

    Attributes:
        features: Output channels.
        kernel_size: Sides of the core, one for each axis of an image. One number is the
            side of a square, where `nn.Conv` takes it for the only axis.
        rank_in: Channels before the core, of each group, in [1, c_in / groups], and at
            most what the kernel's unfolding can have (`max_ranks`).
        rank_out: Channels after the core, of each group, in [1, features / groups], and
            at most what the unfolding can have.
        strides: Strides of the core, as `nn.Conv` has them.
        padding: Padding of the core, as `nn.Conv` has it.
        kernel_dilation: Dilation of the core, as `nn.Conv` has it.
        feature_group_count: Groups of channels that do not mix, in all three.
        precision: Precision of all three products, as `nn.Conv` has it; None with an
            inertial core.
        core: A `Conv`, or, for images of two axes, an `Inertial` whose `core_size` is
            `kernel_size`; in the window reading, `padding` is then that of its region.
        axis_name: Mesh axis of an inertial core, as `InertialConv` has it.
        is_folded: Whether BatchNorm is merged into it, as `fold_batch_norm` sets it. On
            a TPU, its factors are then convolutions in evaluation, too, not products.

    Raises:
        ValueError: A rank outside its range, a core of another side than `kernel_size`,
            or groups that do not divide the channels.

    Example:
        >>> layer = ij.Tucker2Conv(4, (3, 3), rank_in=1, rank_out=2)
        >>> outputs, first = layer.init_with_output(jax.random.key(0), images)
        >>> outputs.shape, first["params"]["core"]["kernel"].shape
        ((16, 28, 28, 4), (3, 3, 1, 2))
    """

    features: int
    kernel_size: int | Sequence[int]
    rank_in: int
    rank_out: int
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    precision: Any = None
    core: Conv | Inertial = Conv()
    axis_name: str | None = None
    is_folded: bool = False

    @nn.compact
    def __call__(
        self, inputs: Float[ArrayLike, "*image c_in"], *, train: bool = False
    ) -> Float[Array, "*out features"]:
        x = jnp.asarray(inputs)
        groups, size = self.feature_group_count, self.sides
        c_in = x.shape[-1]
        check_groups(groups, c_in, self.features)
        most_in, most_out = max_ranks(
            (*size, c_in // groups, self.features), groups=groups
        )
        check_rank("rank_in", self.rank_in, most_in)
        check_rank("rank_out", self.rank_out, most_out)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        # Evaluating 256 images with BatchNorm, products take 0.94 and 0.89 of the time
        # of convolutions for VGG16 and SimpleDLA on v5e, by XLA's estimate, and 1.01
        # for ResNet18; with BatchNorm folded, 1.12, 1.03 and 1.02.
        on_tpu: MixingForm = "convolution" if train or self.is_folded else "product"
        outer = common | {
            "feature_group_count": groups,
            "precision": self.precision,
            "num_axes": len(size),
            "multiply": functools.partial(pointwise_conv, on_tpu=on_tpu),
        }
        x = Pointwise(groups * self.rank_in, name="u_in", **outer)(x)
        core_common = {"padding": self.padding, "use_bias": False, **common}
        core = self.core
        side = core.core_size if isinstance(core, Inertial) else core.kernel_size
        if side is not None and size != (side,) * len(size):
            raise ValueError(
                f"`kernel_size` (={self.kernel_size}) must be that of `core` (={core})."
            )
        if isinstance(core, Inertial):
            self._check_plain(core, size)
            x = InertialConv.from_spec(
                core,
                self.rank_out,
                strides=self.strides or 1,
                axis_name=self.axis_name,
                name="core",
                **core_common,
            )(x, train=train)
        else:
            # Elsewhere the core would be traced twice, to no avail.
            shapes = (*size, self.rank_in, self.rank_out), (self.features,)
            joins = train and groups == 1 and len(size) == 2 and joining_pays(*shapes)
            calls: list[_CoreCall] = []
            convolve = functools.partial(conv_for_linen, train=train)

            def recorded(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
                def apply(x: Array, kernel: Array) -> Array:
                    return convolve(x, kernel, *args, **options)

                calls.append(_CoreCall(apply, x, kernel, apply(x, kernel)))
                return calls[0].y

            x = nn.Conv(
                groups * self.rank_out,
                size,
                strides=self.strides,
                kernel_dilation=self.kernel_dilation,
                feature_group_count=groups,
                precision=self.precision,
                conv_general_dilated=recorded if joins else convolve,
                name="core",
                **core_common,
            )(x)
            is_its_own = bool(calls) and calls[0].y is x and not is_replaced()
            # In a trace, what nothing uses is not computed. Out of training the core
            # stays by itself on TPU, too: evaluating 256 images by ResNet18 takes 1.89
            # million cycles on v5e so, by XLA's estimate, and 2.01 joined.
            if is_its_own and isinstance(x, jax.core.Tracer):
                outer["multiply"] = functools.partial(_after, calls[0])
        return Pointwise(
            self.features,
            use_bias=self.use_bias,
            bias_init=self.bias_init,
            name="u_out",
            **outer,
        )(x)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the core, one for each axis of an image."""
        return filter_sides(self.kernel_size)

    def _check_plain(self, core: Inertial, size: tuple[int, ...]) -> None:
        """Raises ValueError where the convolution is more than an inertial core can."""
        if len(size) != 2:
            raise ValueError(f"`core` (={core}) must be one of images of two axes.")
        if self.feature_group_count != 1 or pair(self.kernel_dilation or 1) != (1, 1):
            raise ValueError(f"`core` (={core}) must have neither groups nor dilation.")
        if self.precision is not None:
            raise ValueError(
                f"`precision` (={self.precision}) must be None with `core` (={core})."
            )
