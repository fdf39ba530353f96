"""VGG16 with BatchNorm and one linear layer (kuangliu's CIFAR form)."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.models.network import Network
from inertia_jax.ops import max_pool2d

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(Network):
    """VGG16 (Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556).

    Takes images of at least 32 x 32; what five halvings leave is averaged.
    """

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        x = jnp.asarray(x)
        if min(x.shape[1:3]) < 32:
            raise ValueError(
                f"`x` (shape {x.shape}) must be at least 32 x 32 for VGG16."
            )
        make = self.make_layers(train)
        index = 0  # The index in PyTorch's Sequential also counts ReLU and pooling.
        for stage in _STAGES:
            for channels in stage:
                name, norm = f"features_{index}", f"features_{index + 1}"
                features = self.channels(channels)
                x = make.conv(self, name, x, features, 3, padding=1, use_bias=True)
                x = nn.relu(make.norm(self, norm, x))
                index += 3
            x = max_pool2d(x, window=2)
            index += 1
        return make.dense(self, "classifier", x.mean((1, 2)), self.num_classes)
