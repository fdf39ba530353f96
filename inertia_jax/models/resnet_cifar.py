"""The CIFAR ResNets of He et al.: 20, 32, 44 and 56 layers."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers import Layers, scaled
from inertia_jax.models.resnet import BasicBlock
from inertia_jax.plan import Plan


class PadBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut free of parameters (option A).

    Where the shape changes, the shortcut takes every second pixel and pads the new
    channels with zeros, half in front and half behind.

    Attributes:
        features: Output channels.
        strides: Stride of the first convolution and of the shortcut.
        layers: Settings of the network.
    """

    features: int
    strides: int
    layers: Layers

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
        x = x[:, ::strides, ::strides]
        new = self.features - x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        return nn.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet20/32/44/56 (He et al., 2015, https://arxiv.org/abs/1512.03385, 4.2).

    Attributes:
        depth: 6 n + 2 layers, n blocks a stage.
        num_classes: Outputs.
        width: Multiplies every number of channels.
        shortcut: `A`, padding, or `B`, a 1x1 convolution, where the shape changes.
        plan: Which kind of convolution stands where.
        dtype: Type of the computation.
        axis_name: Mesh axis over which BatchNorm statistics are averaged.
    """

    depth: int = 20
    num_classes: int = 10
    width: float = 1.0
    shortcut: str = "A"
    plan: Plan = Plan()
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "n h w c"], *, train: bool = False
    ) -> Float[Array, "n classes"]:
        x = jnp.asarray(x)
        make = Layers(self.plan, self.dtype, self.axis_name)
        block_type = PadBlock if self.shortcut == "A" else BasicBlock
        x = make.conv(
            self, "conv1", x, scaled(16, self.width), 3, padding=1, train=train
        )
        x = nn.relu(make.norm(self, "bn1", x, train=train))
        for stage in range(3):
            features = scaled(16 * 2**stage, self.width)
            for block in range((self.depth - 2) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = block_type(features, strides, make, name=name)(x, train=train)
        return make.dense(self, "linear", x.mean((1, 2)), self.num_classes)
