"""The residual block, and ResNet18 with kuangliu's stem or torchvision's."""

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
        self, x: Float[Array, "n h w c_in"], *, train: bool
    ) -> Float[Array, "n h_out w_out c_out"]:
        make, strides = self.layers, self.strides
        y = make.conv(
            self, "conv1", x, self.features, 3, strides=strides, padding=1, train=train
        )
        y = nn.relu(make.norm(self, "bn1", y, train=train))
        y = make.conv(self, "conv2", y, self.features, 3, padding=1, train=train)
        y = make.norm(self, "bn2", y, train=train)
        if strides != 1 or x.shape[-1] != self.features:
            x = self._shortcut(x, train=train)
        return nn.relu(y + x)

    def _shortcut(
        self, x: Float[Array, "n h w c_in"], *, train: bool
    ) -> Float[Array, "n h_out w_out c_out"]:
        make, strides, name = self.layers, self.strides, self.shortcut
        if name is None:
            new = self.features - x.shape[-1]
            x = x[:, ::strides, ::strides]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        x = make.conv(
            self, f"{name}_0", x, self.features, 1, strides=strides, train=train
        )
        return make.norm(self, f"{name}_1", x, train=train)


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
        make = self.make_layers()
        imagenet = self.stem == "imagenet"
        features = self.channels(64)
        if imagenet:
            y = make.conv(
                self, "conv1", y, features, 7, strides=2, padding=3, train=train
            )
        else:
            y = make.conv(self, "conv1", y, features, 3, padding=1, train=train)
        y = nn.relu(make.norm(self, "bn1", y, train=train))
        if imagenet:
            y = nn.max_pool(y, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(4):
            features = self.channels(64 * 2**stage)
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                y = BasicBlock(
                    features,
                    strides,
                    make,
                    "downsample" if imagenet else "shortcut",
                    name=f"layer{stage + 1}_{block}",
                )(y, train=train)
        y = y.mean((1, 2))
        return make.dense(self, "fc" if imagenet else "linear", y, self.num_classes)
