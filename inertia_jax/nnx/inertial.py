"""The inertial convolution as an NNX module, computed by Linen's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers import inertial
from inertia_jax.layers.in_place import with_region_padding
from inertia_jax.nnx.variables import CLASSES, iter_variables, put_at
from inertia_jax.ops.conv.conv import pair
from inertia_jax.plan.specs import Inertial, fields_as


class InertialConv(nnx.Module):
    """An inertial convolution, used like `nnx.Conv` of two dimensions.

        InertialConv(3, 32, (3, 3), reading="tiled", rngs=rngs)

    It computes as `inertia_jax.InertialConv` does, and its variables have the names of
    that layer's: `kernel`, `bias`, `weights`, `threshold` (an `nnx.Param` if it is
    learned, else a `GateThreshold`) and `friction_mean` (`nnx.BatchStat`). In training
    mode, thresholds with a `Rate` and the mean of `relative` friction move. Under
    `nnx.capture`, calls sow `gate_rate` and `friction` as `nnx.Intermediate`.

    Arguments that are not listed are those of `nnx.Conv`, or the fields of `Inertial`.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        core_size: Side of the core, or both sides. None: `kernel_size`.
        region_size: Side of the region, as in `inertia_jax.InertialConv`.
        padding: Padding of the m x m convolution in the tiled reading, of the region in
            the window reading, or of the convolution of `kernel_size`.
        kernel_size: Sides of the convolution whose place the layer takes, with the same
            padding and the same output grid. None: there is no such convolution.
        axis_name: Mesh axis over whose devices friction is taken together.
        use_running_average: Whether the layer is in evaluation mode, as `nnx.BatchNorm`
            has it; `train()` and `eval()` of the network set it.

    Raises:
        ValueError: What `inertia_jax.InertialConv` refuses.

    Example:
        >>> from flax import nnx
        >>> tiled = {"reading": "tiled", "threshold": ij.Rate(0.25)}
        >>> layer = ij.nnx.InertialConv(1, 4, (3, 3), **tiled, rngs=nnx.Rngs(0))
        >>> layer.train()
        >>> layer(images).shape, layer.threshold[...].item() > 0
        ((16, 28, 28, 4), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        core_size: int | Sequence[int] | None = None,
        region_size: int | None = None,
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Any = "SAME",
        kernel_size: int | Sequence[int] | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        axis_name: str | None = None,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
        **fields: Any,
    ) -> None:
        """Draws the variables from `rngs`."""
        if core_size is None:
            core_size, kernel_size = kernel_size, None
        self.in_features, self.out_features = in_features, out_features
        self.strides, self.padding = strides, padding
        self.use_bias, self.axis_name = use_bias, axis_name
        self.dtype, self.param_dtype = dtype, param_dtype
        # Those of an `nnx.Conv` that an inertial convolution has no others of.
        self.kernel_dilation = self.feature_group_count = 1
        self.precision = None
        self.use_running_average = use_running_average
        layer = inertial.InertialConv(
            out_features, core_size, region_size, parent=None, **fields
        )
        spec = self.spec = layer.spec
        side = spec.core_size if spec.reading == "tiled" else spec.region_size
        self.kernel_size = pair(side if kernel_size is None else kernel_size)

        # NNX's initialisers with metadata give a number in a box, as Linen's do not.
        boxes: dict[str, Any] = {}
        inits: dict[str, Any] = {
            "kernel_init": _unboxed(kernel_init, "kernel", boxes),
            "bias_init": _unboxed(bias_init, "bias", boxes),
        }
        side = spec.region_size + max(self.kernel_size)
        x = jax.ShapeDtypeStruct((1, side, side, in_features), param_dtype)
        layer = self._linen(((0, 0), (0, 0))).clone(**inits, parent=None)
        for collection, leaves in layer.lazy_init(rngs.params(), x).items():
            for name, value in leaves.items():
                value = jnp.asarray(value)
                if name in boxes:
                    value = dataclasses.replace(boxes[name], raw_value=value)
                setattr(self, name, CLASSES[collection](value))
        if not use_bias:
            self.bias = nnx.data(None)

    def _linen(self, padding: Any) -> inertial.InertialConv:
        """Returns the layer of Linen that computes what this one does."""
        return inertial.InertialConv(
            self.out_features,
            strides=self.strides,
            padding=padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            parent=None,
            **fields_as(Inertial, self.spec),
        )

    def __call__(
        self, inputs: Float[ArrayLike, "*batch h w c_in"]
    ) -> Float[Array, "*batch h_out w_out features"]:
        train = not self.use_running_average
        place = nn.Conv(
            self.out_features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            parent=None,
        )
        x, pads = with_region_padding(place, self.spec, jnp.asarray(inputs))
        variables: dict[str, Any] = {}
        own = dict(iter_variables(self, [()]))
        for where, leaf in own.items():
            put_at(variables, where, leaf.get_value())
        mutable = ["batch_stats", "thresholds"] if train else []
        if hasattr(self, "__captures__"):
            mutable.append("intermediates")
        y, changed = self._linen(pads).apply(variables, x, train=train, mutable=mutable)
        for collection, leaves in changed.items():
            for name, value in leaves.items():
                if collection == "intermediates":
                    self.sow(nnx.Intermediate, name, value[0])
                else:
                    own[collection, name].set_value(value)
        return y


def _unboxed(init: Initializer, name: str, boxes: dict[str, Any]) -> Initializer:
    """Returns an initialiser without metadata, and puts what has them into `boxes`."""

    def unboxed(*args: Any, **options: Any) -> Any:
        value = init(*args, **options)
        if isinstance(value, nnx.VariableMetadata):
            boxes[name] = value
            return value.raw_value
        return value

    return unboxed
