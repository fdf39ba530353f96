"""The CIFAR ResNets of He et al.: 20, 32, 44 and 56 layers."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.models.network import Network
from inertia_jax.models.resnet import apply_stages


class CifarResNet(Network, kw_only=True):
    """ResNet20/32/44/56 (He et al., 2015, https://arxiv.org/abs/1512.03385, 4.2).

    Attributes beside those of `Network`:
        depth: 6 n + 2 layers, n blocks a stage.
        shortcut: `A`, padding, or `B`, a 1x1 convolution, where the shape changes.
    """

    depth: int = 20
    shortcut: str = "A"

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        x = jnp.asarray(x)
        make = self.make_layers(train)
        shortcut = None if self.shortcut == "A" else "shortcut"
        x = make.conv(self, "conv1", x, self.channels(16), 3, padding=1)
        x = nn.relu(make.norm(self, "bn1", x))
        widths = [self.channels(16 * 2**stage) for stage in range(3)]
        blocks = (self.depth - 2) // 6
        x = apply_stages(x, make, widths, blocks=blocks, shortcut=shortcut)
        return make.dense(self, "linear", x.mean((1, 2)), self.num_classes)
