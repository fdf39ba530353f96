"""The residual block, and ResNet18 with kuangliu's stem or torchvision's."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.models.layers import Layers
from inertia_jax.models.network import Network


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, of two kinds.

    Attributes:
        features: Output channels.
        strides: Stride of the first convolution and of the shortcut.
        layers: Settings of the network.
        shortcut: Name of the layers of a 1x1 shortcut (option B); None: one without
            parameters (option A), every second pixel and new channels of zeros, half in
            front and half behind.
    """

    features: int
    strides: int
    layers: Layers
    shortcut: str | None = "shortcut"

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c_in"]
    ) -> Float[Array, "n h_out w_out c_out"]:
        make, strides = self.layers, self.strides
        y = make.conv(self, "conv1", x, self.features, 3, strides=strides, padding=1)
        y = nn.relu(make.norm(self, "bn1", y))
        y = make.conv(self, "conv2", y, self.features, 3, padding=1)
        y = make.norm(self, "bn2", y)
        if strides != 1 or x.shape[-1] != self.features:
            x = self._shortcut(x)
        return nn.relu(y + x)

    def _shortcut(
        self, x: Float[Array, "n h w c_in"]
    ) -> Float[Array, "n h_out w_out c_out"]:
        make, strides, name = self.layers, self.strides, self.shortcut
        if name is None:
            new = self.features - x.shape[-1]
            x = x[:, ::strides, ::strides]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        x = make.conv(self, f"{name}_0", x, self.features, 1, strides=strides)
        return make.norm(self, f"{name}_1", x)


def apply_stages(
    x: Float[Array, "n h w c"],
    layers: Layers,
    widths: Sequence[int],
    *,
    blocks: int,
    shortcut: str | None,
) -> Float[Array, "n h_out w_out c_out"]:
    """Applies stages of `blocks` residual blocks; all but the first halve the map."""
    for stage, features in enumerate(widths, start=1):
        for block in range(blocks):
            strides = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}_{block}"
            x = BasicBlock(features, strides, layers, shortcut, name=name)(x)
    return x


class ResNet18(Network, kw_only=True):
    """ResNet18 (He et al., 2015, https://arxiv.org/abs/1512.03385).

    Attributes beside those of `Network`:
        stem: `cifar`, a 3x3 convolution, or `imagenet`, 7x7 stride 2 and a max-pool,
            with torchvision's names for shortcut and head.
    """

    stem: str = "cifar"

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        y = jnp.asarray(x)
        make = self.make_layers(train)
        imagenet, features = self.stem == "imagenet", self.channels(64)
        if imagenet:
            y = make.conv(self, "conv1", y, features, 7, strides=2, padding=3)
        else:
            y = make.conv(self, "conv1", y, features, 3, padding=1)
        y = nn.relu(make.norm(self, "bn1", y))
        if imagenet:
            y = nn.max_pool(y, (3, 3), (2, 2), ((1, 1), (1, 1)))
        widths = [self.channels(64 * 2**stage) for stage in range(4)]
        shortcut = "downsample" if imagenet else "shortcut"
        y = apply_stages(y, make, widths, blocks=2, shortcut=shortcut).mean((1, 2))
        return make.dense(self, "fc" if imagenet else "linear", y, self.num_classes)
