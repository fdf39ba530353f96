"""The inertial convolution as a Linen module: its variables, and when they move."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.conv import Padding, pair, stride_pair
from inertia_jax.ops.inertial.friction import friction as region_friction
from inertia_jax.ops.inertial.gates import hard_gate, rate_threshold
from inertia_jax.ops.inertial.tiled import inertial_conv_tiled
from inertia_jax.ops.inertial.tiles import Tiling, make_tiling
from inertia_jax.ops.inertial.window import inertial_conv, weights_shape
from inertia_jax.plan.specs import Fixed, Inertial, Learned, Threshold, fields_as

# Names of the values that a layer sows, and of its running mean.
GATE_RATE, FRICTION = "gate_rate", "friction"
FRICTION_MEAN = "friction_mean"

# Momentum of the running means, as Flax counts it: the share that is kept.
_MOMENTUM = 0.9


class InertialConv(nn.Module):
    """An inertial convolution, which is used like `nn.Conv` of two dimensions.

        InertialConv(32, (3, 3), padding="VALID", reading="tiled")

    Parameters: `kernel` [m, m, c_in, features] (half the features for `stack`), `bias`,
    `weights` of the weighted joins, `threshold` if learned. Other thresholds are in the
    collection `thresholds`, so that they change without compiling anew; the running
    mean of `relative` friction is `friction_mean` in `batch_stats`. Calls sow
    `gate_rate` [n] into `intermediates`: the share of open gates of each image,
    differentiable where `gate_gradient` is `ste`; and `friction`.

    In training, `thresholds` and `batch_stats` must be mutable where `Rate` and
    `relative` move them. Before the first training batch, a `Rate` threshold is 0 and
    a `relative` friction is divided by 1.

    Attributes that are not listed are those of `nn.Conv`, or the fields of `Inertial`,
    which `from_spec` copies from a spec.

    Attributes:
        features: Number of output channels.
        core_size: Side m of the core, or both sides, as `nn.Conv` has them. By name, it
            may also be called `kernel_size`.
        region_size: Side d of the region, > m. None: m + 1 in the tiled reading, whose
            tiles are then 2 x 2, and m + 2 in the window reading.
        strides: Distance between outputs, in pixels; 1 for the tiled reading.
        padding: Zeros around the image: of the region in the window reading, of the
            m x m convolution in the tiled one.
        axis_name: Mesh axis over whose devices `Rate` and `relative` take the friction
            together.

    Raises:
        ValueError: What `Inertial` refuses, a core that is not square, tiles with
            strides, or `stack` of an odd number of features.

    Example:
        >>> layer = ij.InertialConv(4, (3, 3), reading="tiled", threshold=ij.Fixed(0.5))
        >>> outputs, first = layer.init_with_output(jax.random.key(0), images)
        >>> outputs.shape, sorted(first["params"]), sorted(first["thresholds"])
        ((16, 28, 28, 4), ['bias', 'kernel'], ['threshold'])
    """

    features: int
    core_size: Any = None
    region_size: Any = None
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    axis_name: str | None = None
    reading: str = Inertial.reading
    metric: str = Inertial.metric
    reference: str = Inertial.reference
    relative: bool = Inertial.relative
    combine: str = Inertial.combine
    zero_middle: bool = Inertial.zero_middle
    low: str = Inertial.low
    threshold: Threshold = Inertial.threshold
    gate_gradient: str = Inertial.gate_gradient
    slope: float = Inertial.slope
    channel_stride: int = Inertial.channel_stride
    capacities: Sequence[float] | None = Inertial.capacities
    kernel_size: dataclasses.InitVar[Any] = None

    def __post_init__(self, kernel_size: Any = None) -> None:
        """Fills in the sizes that are not given. Flax calls it again for a field."""
        call = "InertialConv(features, (3, 3), strides=1)"
        if (self.core_size is None) == (kernel_size is None):
            raise ValueError(
                f"either `core_size` (={self.core_size}) or `kernel_size` "
                f"(={kernel_size}) must be given, as in {call}."
            )
        given = self.core_size if kernel_size is None else kernel_size
        sides = pair(given, "core_size", least=1)
        if len({*sides}) > 1:
            raise ValueError(f"`core_size` (={given}) must be square, as in {call}.")
        if np.ndim(self.region_size):
            raise ValueError(
                f"`region_size` (={self.region_size}) must be one integer; strides and "
                f"what follows them are given by name, as in {call}."
            )
        self.core_size = sides[0]
        if self.region_size is None:
            more = 1 if self.reading == "tiled" else 2
            self.region_size = self.core_size + more
        super().__post_init__()

    @property
    def spec(self) -> Inertial:
        """The spec that a plan has for this layer."""
        return Inertial(**fields_as(Inertial, self))

    @classmethod
    def from_spec(cls, spec: Inertial, features: int, **linen: Any) -> "InertialConv":
        """Makes the layer that a plan's spec describes.

        Args:
            spec: Fields of the layer that a plan chooses.
            features: Number of output channels.
            **linen: Any of the other fields, and `name` and `parent`.
        """
        return cls(features, **fields_as(Inertial, spec), **linen)

    @property
    def core_features(self) -> int:
        """Filters of the core."""
        return self.features // 2 if self.combine == "stack" else self.features

    @nn.compact
    def __call__(
        self, inputs: Float[ArrayLike, "*batch h w c_in"], *, train: bool = False
    ) -> Float[Array, "*batch h_out w_out features"]:
        x = jnp.asarray(inputs)
        spec = self.spec
        if spec.reading == "tiled" and stride_pair(self.strides) != (1, 1):
            raise ValueError(
                f"`strides` (={self.strides}) must be 1 for `reading` (='tiled')."
            )
        if spec.combine == "stack" and self.features % 2:
            raise ValueError(
                f"`features` (={self.features}) must be even for `combine` (='stack')."
            )
        batch = x.shape[:-3]
        x = x.reshape(math.prod(batch), *x.shape[-3:])
        m, c_in = self.core_size, x.shape[-1]
        shape = (m, m, c_in, self.core_features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        weights = self._weights(spec, c_in)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = jnp.asarray(x)
        measure: dict[str, Any] = {
            "region_size": spec.region_size,
            "metric": spec.metric,
            "reference": spec.reference,
            "channel_stride": spec.channel_stride,
        }
        friction = None
        if train or spec.relative or spec.reading == "window":
            friction = self._friction(x, measure, train=train)
        # If friction is None, the operation computes it, chunk by chunk, in the cache.
        threshold = self._threshold(friction, train=train)
        common: dict[str, Any] = {
            "threshold": threshold,
            "padding": self.padding,
            "gate_gradient": spec.gate_gradient,
            "slope": spec.slope,
            "friction": friction,
            **measure,
        }
        if spec.reading == "window":
            strides = stride_pair(self.strides)
            common |= {"combine": spec.combine, "weights": weights, "strides": strides}
            y, _, friction = inertial_conv(x, kernel, **common)
        else:
            common |= {
                "low": spec.low,
                "capacities": None if train else spec.capacities,
            }
            y, _, friction = inertial_conv_tiled(x, kernel, **common)

        opening = hard_gate(
            friction[..., None], threshold.reshape(1, 1, 1, -1), slope=spec.slope
        )
        if spec.gate_gradient == "none":
            opening = lax.stop_gradient(opening)
        self.sow("intermediates", GATE_RATE, opening.mean((1, 2, 3)))
        self.sow("intermediates", FRICTION, friction)
        if bias is not None:
            y = y + bias.reshape(1, 1, 1, -1)
        return y.reshape(*batch, *y.shape[1:])

    def _weights(self, spec: Inertial, c_in: int) -> Array | np.ndarray | None:
        shape = weights_shape(
            spec.combine,
            core_size=spec.core_size,
            region_size=spec.region_size,
            c_in=c_in,
            core_features=self.core_features,
        )
        if shape is None:
            return None
        num_weights = math.prod(shape[:2]) - spec.zero_middle
        init = nn.initializers.constant(1 / num_weights)
        weights = self.param("weights", init, shape, self.param_dtype)
        if spec.zero_middle:
            middle = (shape[0] - 1) // 2
            weights = weights.at[middle, middle].set(0)
        return weights

    @nn.nowrap
    def tiling(self, image_size: tuple[int, int]) -> Tiling:
        """Returns the tiles of the tiled reading, for images of this size."""
        return make_tiling(
            image_size,
            core_size=self.core_size,
            region_size=self.region_size,
            padding=self.padding,
            low=self.spec.low,
        )

    def _friction(self, x: Array, measure: dict[str, Any], *, train: bool) -> Array:
        strides, padding = stride_pair(self.strides), self.padding
        if self.reading == "tiled":
            tiling = self.tiling((x.shape[1], x.shape[2]))
            strides = (tiling.tile_size, tiling.tile_size)
            padding = tiling.pads
        friction = region_friction(
            x, core_size=self.core_size, strides=strides, padding=padding, **measure
        )
        if not self.relative:
            return friction
        ones = lambda: jnp.ones((), friction.dtype)  # noqa: E731
        running = self.variable("batch_stats", FRICTION_MEAN, ones)
        if not train or self.is_initializing():
            return friction / running.value
        mean = lax.stop_gradient(friction).mean()
        if self.axis_name is not None:
            mean = lax.pmean(mean, self.axis_name)
        running.value = _running_mean(running.value, mean)
        # If every region is flat, the mean is 0, and friction stays as it is.
        return friction / jnp.where(mean > 0, mean, 1)

    def _threshold(self, friction: Array | None, *, train: bool) -> Array:
        threshold, dtype = self.threshold, self.param_dtype
        if isinstance(threshold, Learned):
            shape = (self.core_features,) if threshold.per_channel else ()
            init = nn.initializers.constant(threshold.init)
            return jnp.asarray(self.param("threshold", init, shape, dtype))
        first = threshold.value if isinstance(threshold, Fixed) else 0.0
        stored = self.variable(
            "thresholds", "threshold", lambda: jnp.full((), first, dtype)
        )
        moves = train and not self.is_initializing()
        if isinstance(threshold, Fixed) or friction is None or not moves:
            return jnp.asarray(stored.value)
        value = rate_threshold(
            friction, threshold.target, axis_name=self.axis_name
        ).astype(dtype)
        stored.value = _running_mean(stored.value, value)
        return value


def mean_gate_rate(
    gate_rates: Sequence[Float[Array, "n"]], frictions: Sequence[Array]
) -> Float[Array, "n"]:
    """Returns the share of open gates over all calls of a layer, of each image.

    Args:
        gate_rates: What the calls sowed as `gate_rate`.
        frictions: What they sowed as `friction`, one value a gate.
    """
    if len(gate_rates) == 1:
        return gate_rates[0]
    sizes = np.array([friction.size for friction in frictions])
    shares = sizes / sizes.sum()
    return sum(r * share for r, share in zip(gate_rates, shares, strict=True))


def _running_mean(running: Array, value: Array) -> Array:
    return _MOMENTUM * running + (1 - _MOMENTUM) * value
