"""A network in NNX and in Linen, with the same names and the same weights."""

import numpy as np
from flax import linen as nn
from flax import nnx

import inertia_jax as ij

SHAPE = (8, 8, 4)
X = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype(np.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), padding="CIRCULAR", rngs=rngs)

    def __call__(self, x):
        return x + self.conv2(nnx.relu(self.bn1(self.conv1(x))))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
        self.block = Block(rngs)
        self.point = nnx.Conv(8, 16, (1, 1), rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.block(self.stem(x))
        return self.fc(self.drop(self.point(x).mean((1, 2))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        y = nn.Conv(8, (3, 3), use_bias=False, name="conv1")(x)
        # The momentum of NNX is its default as well.
        y = nn.BatchNorm(use_running_average=not train, name="bn1")(y)
        return x + nn.Conv(8, (3, 3), padding="CIRCULAR", name="conv2")(nn.relu(y))


class LinenNet(nn.Module):
    drop_rate: float = 0.5

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
        x = LinenBlock(name="block")(x, train=train)
        x = nn.Conv(16, (1, 1), name="point")(x).mean((1, 2))
        x = nn.Dropout(self.drop_rate, deterministic=not train)(x)
        return nn.Dense(10, name="fc")(x)


def make_pair(seed=0):
    """Returns an NNX module in evaluation mode, and (model, variables) of Linen."""
    net = Net(nnx.Rngs(seed))
    net.eval()
    return net, (LinenNet(), linen_variables(net))


def linen_variables(module):
    _, variables = ij.nnx.as_linen(module)
    return {name: variables[name] for name in ("params", "batch_stats")}
