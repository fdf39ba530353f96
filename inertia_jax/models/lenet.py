"""The small network of PyTorch's MNIST example, known as LeNet here."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.models.layers import Dropout
from inertia_jax.models.network import Network
from inertia_jax.ops import max_pool2d


class LeNet(Network):
    """Two 3x3 convolutions, max-pool, two linear layers, dropout between.

    The number of parameters depends on the image size: 1,199,882 at 28 x 28 x 1.
    `width` multiplies its hidden units, too; `axis_name` is without effect: there are
    no statistics to average.
    """

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        x = jnp.asarray(x)
        if min(x.shape[1:3]) < 6:
            raise ValueError(f"`x` (shape {x.shape}) must be at least 6 x 6 for LeNet.")
        make = self.make_layers(train)
        for name, channels in (("conv1", 32), ("conv2", 64)):
            features = self.channels(channels)
            x = nn.relu(make.conv(self, name, x, features, 3, use_bias=True))
        x = max_pool2d(x, window=2)
        x = Dropout(0.25, name="dropout1")(x, train=train)
        # Flattened channel by channel, as PyTorch does, so that weights move both ways.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(make.dense(self, "fc1", x, self.channels(128)))
        x = Dropout(0.5, name="dropout2")(x, train=train)
        return make.dense(self, "fc2", x, self.num_classes)
