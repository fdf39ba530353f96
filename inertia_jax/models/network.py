"""The base class of all networks."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from inertia_jax.models.layers import Layers
from inertia_jax.plan.plan import Plan


def scaled(channels: int, width: float) -> int:
    """Returns the number of channels at `width`: `max(1, round(channels * width))`."""
    return max(1, round(channels * width))


class Network(nn.Module, kw_only=True):
    """A network whose convolutions a plan chooses.

    Attributes:
        num_classes: Number of outputs.
        width: Factor of every number of channels.
        plan: The plan that chooses the convolutions.
        dtype: Type of the computation.
        axis_name: Mesh axis over which BatchNorm statistics are averaged.
    """

    num_classes: int = 10
    width: float = 1.0
    plan: Plan = Plan()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.nowrap
    def make_layers(self, train: bool) -> Layers:
        """Returns the maker of the network's layers."""
        return Layers(self.plan, self.dtype, self.axis_name, train)

    @nn.nowrap
    def channels(self, channels: int) -> int:
        """Returns the number of channels at the network's width."""
        return scaled(channels, self.width)
