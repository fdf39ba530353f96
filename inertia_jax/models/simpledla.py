"""SimpleDLA: deep layer aggregation without its extra links (kuangliu's)."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.models.layers import Layers
from inertia_jax.models.network import Network
from inertia_jax.models.resnet import BasicBlock


class Root(nn.Module):
    """The join of two maps: concatenation, 1x1 convolution, BatchNorm, ReLU."""

    features: int
    layers: Layers

    @nn.compact
    def __call__(
        self, left: Float[Array, "n h w c"], right: Float[Array, "n h w c"]
    ) -> Float[Array, "n h w c"]:
        x = jnp.concatenate([left, right], axis=-1)
        x = self.layers.conv(self, "conv", x, self.features, 1)
        return nn.relu(self.layers.norm(self, "bn", x))


class Tree(nn.Module):
    """A binary tree of residual blocks, joined pairwise by roots.

    Attributes:
        features: Output channels.
        level: Height of the tree: 2**level blocks.
        strides: Stride of the first block.
        layers: Settings of the network.
    """

    features: int
    level: int
    strides: int
    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c_in"]
    ) -> Float[Array, "n h_out w_out c_out"]:
        def child(strides: int, name: str) -> nn.Module:
            if self.level == 1:
                return BasicBlock(self.features, strides, self.layers, name=name)
            return Tree(self.features, self.level - 1, strides, self.layers, name=name)

        left = child(self.strides, "left")(x)
        right = child(1, "right")(left)
        return Root(self.features, self.layers, name="root")(left, right)


class SimpleDLA(Network):
    """SimpleDLA (after Yu et al., 2017, https://arxiv.org/abs/1707.06484)."""

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        x = jnp.asarray(x)
        make = self.make_layers(train)
        for name, channels in (("base", 16), ("layer1", 16), ("layer2", 32)):
            features = self.channels(channels)
            x = make.conv(self, f"{name}_0", x, features, 3, padding=1)
            x = nn.relu(make.norm(self, f"{name}_1", x))
        trees = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 1, 2))
        for index, (channels, level, strides) in enumerate(trees, start=3):
            features = self.channels(channels)
            tree = Tree(features, level, strides, make, name=f"layer{index}")
            x = tree(x)
        return make.dense(self, "linear", x.mean((1, 2)), self.num_classes)
