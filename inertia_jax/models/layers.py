"""Linen layers as the models use them: PyTorch's defaults, chosen by the plan."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer
from jaxtyping import Float

from inertia_jax.layers.batch_norm import BatchNormToTrain
from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.low_rank import LowRankConv, LowRankDense
from inertia_jax.layers.tucker import Tucker2Conv
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.precision import at_least_float32
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.specs import (
    Conv,
    Inertial,
    LowRank,
    Spec,
    Tucker2,
    core_of,
    fields_as,
    stays_dense,
    without_inertia,
)

# Uniform in +-1/sqrt(fan_in): PyTorch's kaiming_uniform_(a=sqrt(5)).
torch_kernel_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Initializer:
    """Returns PyTorch's bias initialiser: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(
        key: Array, shape: Any, dtype: Any = None, out_sharding: Any = None
    ) -> Array:
        return jax.random.uniform(
            key, shape, dtype or jnp.float32, -bound, bound, out_sharding=out_sharding
        )

    return init


# Collection and name of the examples' positions, which `Dropout` reads.
POSITIONS = ("examples", "position")


class Dropout(nn.Module):
    """Zeroes elements at random, the same ones however the batch is split.

    The mask of an example depends on the key of the stream `dropout`, the layer and the
    example's position in the global batch, which a caller who splits the batch passes
    as `variables["examples"]["position"]`, int32 [n]; without it, positions are
    0..n-1. `nn.Dropout` draws one mask a call, so it depends on the split.

    Attributes:
        rate: Share of elements set to zero, in [0, 1); the rest is scaled to keep the
            mean.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "n *features"], *, train: bool
    ) -> Float[Array, "n *features"]:
        if not train:
            return x
        if self.scope is None:
            raise ValueError("Dropout must be called inside `apply`.")
        positions = self.scope.root.get_variable(*POSITIONS, jnp.arange(x.shape[0]))
        key = self.make_rng("dropout")

        def keep(position: Array) -> Array:
            example_key = jax.random.fold_in(key, position)
            return jax.random.bernoulli(example_key, 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(keep)(positions), x / (1 - self.rate), 0)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The settings of a network, and a maker of its layers.

    Called inside `nn.compact`; layers become children of `parent` under `name`.

    Attributes:
        plan: The plan that chooses the convolutions.
        dtype: Type of the computation; parameters are float32, or float64 for float64.
        axis_name: Mesh axis over which BatchNorm statistics are averaged.
        train: Whether the network is called to train.
    """

    plan: Plan
    dtype: Any
    axis_name: str | None
    train: bool

    @property
    def param_dtype(self) -> Any:
        return at_least_float32(self.dtype)

    def conv(
        self,
        parent: nn.Module,
        name: str,
        x: Float[Array, "n h w c_in"],
        features: int,
        kernel_size: int,
        *,
        strides: int = 1,
        padding: int = 0,
        use_bias: bool = False,
    ) -> Float[Array, "n h_out w_out c_out"]:
        """Applies the convolution that the plan has at `name` below `parent`.

        `padding` is PyTorch's: zeros on every side. "SAME" would pad (0, 1) at stride
        2 and shift the output grid, which stays the same whatever the plan has.

        Raises:
            ValueError: The plan asks for ranks that the layer cannot have, or for two
                factors of a convolution that is not 1x1.
        """
        path = "/".join((*parent.path, name))
        spec = _standing(self.plan.spec(path), path, kernel_size, strides)
        core = core_of(spec)
        side = region = kernel_size
        if isinstance(core, Conv):
            side = region = core.kernel_size or kernel_size
        elif isinstance(core, Inertial):
            side = core.core_size
            region = core.region_size if core.reading == "window" else side
        # A filter of another side, or a region, keeps the output grid.
        before = padding + (region - kernel_size) // 2
        after = 2 * padding + region - kernel_size - before
        common: dict[str, Any] = {
            "strides": strides,
            "padding": ((before, after), (before, after)),
            "use_bias": use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": torch_kernel_init,
            "parent": parent,
            "name": name,
        }
        bias_init = torch_bias_init(side**2 * x.shape[-1])
        if isinstance(spec, Inertial):
            common |= {"bias_init": bias_init, "axis_name": self.axis_name}
            return InertialConv.from_spec(spec, features, **common)(x, train=self.train)
        if isinstance(spec, Tucker2):
            return Tucker2Conv(
                features,
                side,
                bias_init=torch_bias_init(spec.rank_out),
                axis_name=self.axis_name,
                **fields_as(Tucker2, spec),
                **common,
            )(x, train=self.train)
        if isinstance(spec, LowRank):
            bias_init = torch_bias_init(spec.rank)
            return LowRankConv(features, spec.rank, bias_init=bias_init, **common)(x)
        return nn.Conv(
            features,
            (side, side),
            bias_init=bias_init,
            conv_general_dilated=functools.partial(conv_for_linen, train=self.train),
            **common,
        )(x)

    def norm(
        self, parent: nn.Module, name: str, x: Float[Array, "n h w c"]
    ) -> Float[Array, "n h w c"]:
        """Applies BatchNorm with PyTorch's constants (Flax counts momentum from 1)."""
        common: dict[str, Any] = {
            "momentum": 0.9,
            "epsilon": 1e-5,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "axis_name": self.axis_name,
            "parent": parent,
            "name": name,
        }
        if self.train:
            return BatchNormToTrain(**common)(x)
        return nn.BatchNorm(use_running_average=True, **common)(x)

    def dense(
        self, parent: nn.Module, name: str, x: Float[Array, "n c_in"], features: int
    ) -> Float[Array, "n c_out"]:
        """Applies a linear layer with bias, or its factors where the plan has them."""
        spec = self.plan.spec("/".join((*parent.path, name)))
        fan_in = spec.rank if isinstance(spec, LowRank) else x.shape[-1]
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": torch_kernel_init,
            "bias_init": torch_bias_init(fan_in),
            "parent": parent,
            "name": name,
        }
        if isinstance(spec, LowRank):
            return LowRankDense(features, spec.rank, **common)(x)
        return nn.Dense(features, **common)(x)


def _standing(spec: Spec, path: str, kernel_size: int, strides: int) -> Spec:
    """Returns the spec of a layer: the plan's, or the one that it falls back to."""
    if stays_dense(spec, kernel_size=kernel_size, strides=strides):
        return without_inertia(spec)
    if isinstance(spec, LowRank) and kernel_size != 1:
        raise ValueError(
            f"the plan has {spec} at {path!r}, whose filters are {kernel_size} x "
            f"{kernel_size}; must be 1 x 1."
        )
    return spec
