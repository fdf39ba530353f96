"""The small network of PyTorch's MNIST example, known as LeNet here."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers import Dropout, Layers, scaled
from inertia_jax.ops import max_pool2d
from inertia_jax.plan import Plan


class LeNet(nn.Module):
    """Two 3x3 convolutions, max-pool, two linear layers, dropout between.

    The number of parameters depends on the image size: 1,199,882 at 28 x 28 x 1.

    Attributes:
        num_classes: Outputs.
        width: Multiplies every number of channels and of hidden units.
        plan: Which kind of convolution stands where.
        dtype: Type of the computation.
        axis_name: Accepted like in every model; there are no statistics to average.
    """

    num_classes: int = 10
    width: float = 1.0
    plan: Plan = Plan()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        x = jnp.asarray(x)
        if min(x.shape[1:3]) < 6:
            raise ValueError(f"`x` (shape {x.shape}) must be at least 6 x 6 for LeNet.")
        make = Layers(self.plan, self.dtype, self.axis_name)
        for name, channels in (("conv1", 32), ("conv2", 64)):
            features = scaled(channels, self.width)
            x = nn.relu(
                make.conv(self, name, x, features, 3, use_bias=True, train=train)
            )
        x = max_pool2d(x, window=2)
        x = Dropout(0.25, name="dropout1")(x, train=train)
        # Flattened channel by channel, as PyTorch does, so that weights move both ways.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(make.dense(self, "fc1", x, scaled(128, self.width)))
        x = Dropout(0.5, name="dropout2")(x, train=train)
        return make.dense(self, "fc2", x, self.num_classes)
