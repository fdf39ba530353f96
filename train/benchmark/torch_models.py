"""The networks of the library in PyTorch, for benchmarks and tests."""

import itertools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from inertia_jax.models.network import scaled
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.specs import LowRank, Tucker2


def conv_norm(c_in: int, c_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Returns a convolution that keeps the grid, and its BatchNorm."""
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, c_in: int, c_out: int, stride: int, name: str = "shortcut"):
        """Makes the layers; `name` is the shortcut's."""
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2, self.bn2 = conv_norm(c_out, c_out, 3)
        self.name = name
        changes = stride != 1 or c_in != c_out
        setattr(
            self,
            name,
            nn.Sequential(*conv_norm(c_in, c_out, 1, stride) if changes else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + getattr(self, self.name)(x))


class ResNet18(nn.Module):
    """ResNet18 with kuangliu's CIFAR stem or torchvision's."""

    def __init__(self, num_classes: int = 10, width: float = 1.0, stem: str = "cifar"):
        """Makes the layers."""
        super().__init__()
        channels = [scaled(64 * 2**stage, width) for stage in range(4)]
        self.imagenet = stem == "imagenet"
        size, stride = (7, 2) if self.imagenet else (3, 1)
        self.conv1, self.bn1 = conv_norm(3, channels[0], size, stride)
        c_in = channels[0]
        for stage, c_out in enumerate(channels):
            name = "downsample" if self.imagenet else "shortcut"
            blocks = [Block(c_in, c_out, 2 if stage else 1, name)]
            blocks.append(Block(c_out, c_out, 1, name))
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.head = "fc" if self.imagenet else "linear"
        setattr(self, self.head, nn.Linear(c_in, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return getattr(self, self.head)(x.mean((2, 3)))


class VGG16(nn.Module):
    """VGG16 with BatchNorm and one linear layer."""

    def __init__(self, num_classes: int = 10, width: float = 1.0):
        """Makes the layers."""
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for stage in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
            for channels in stage:
                c_out = scaled(channels, width)
                layers.append(nn.Conv2d(c_in, c_out, 3, padding=1))
                layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Root(nn.Module):
    """Joins two maps by a 1x1 convolution."""

    def __init__(self, channels: int):
        """Makes the layers."""
        super().__init__()
        self.conv, self.bn = conv_norm(2 * channels, channels, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(torch.cat([left, right], 1))))


class Tree(nn.Module):
    """A binary tree of residual blocks."""

    def __init__(self, c_in: int, c_out: int, level: int, stride: int):
        """Makes the layers."""
        super().__init__()
        self.root = Root(c_out)
        if level == 1:
            self.left: nn.Module = Block(c_in, c_out, stride)
            self.right: nn.Module = Block(c_out, c_out, 1)
        else:
            self.left = Tree(c_in, c_out, level - 1, stride)
            self.right = Tree(c_out, c_out, level - 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return self.root(left, self.right(left))


class SimpleDLA(nn.Module):
    """SimpleDLA."""

    def __init__(self, num_classes: int = 10, width: float = 1.0):
        """Makes the layers."""
        super().__init__()
        c_in = 3
        for name, channels in (("base", 16), ("layer1", 16), ("layer2", 32)):
            c_out = scaled(channels, width)
            setattr(self, name, nn.Sequential(*conv_norm(c_in, c_out, 3), nn.ReLU()))
            c_in = c_out
        trees = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 1, 2))
        for index, (channels, level, stride) in enumerate(trees, start=3):
            c_out = scaled(channels, width)
            setattr(self, f"layer{index}", Tree(c_in, c_out, level, stride))
            c_in = c_out
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("base", *(f"layer{index}" for index in range(1, 7))):
            x = getattr(self, name)(x)
        return self.linear(x.mean((2, 3)))


class LeNet(nn.Module):
    """The network of PyTorch's MNIST example, without its log-softmax."""

    def __init__(self, num_classes: int = 10):
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = self.dropout1(functional.max_pool2d(x, 2)).flatten(1)
        return self.fc2(self.dropout2(functional.relu(self.fc1(x))))


def factorised(module: nn.Module, plan: Plan) -> nn.Module:
    """Returns the network with its convolutions factorised as in a plan.

    Args:
        module: A dense network; its layers are replaced.
        plan: A plan of `Tucker2`, which becomes a Sequential of 1x1, core and 1x1, and
            of `LowRank`, a Sequential of two.
    """
    for name, conv in list(module.named_modules()):
        if not isinstance(conv, nn.Conv2d):
            continue
        spec = plan.spec(re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).replace(".", "/"))
        around: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding}
        has_bias = conv.bias is not None
        c_in, c_out = conv.in_channels, conv.out_channels
        if isinstance(spec, Tucker2):
            r_in, r_out = spec.rank_in, spec.rank_out
            size: Any = conv.kernel_size
            parts = [
                nn.Conv2d(c_in, r_in, 1, bias=False),
                nn.Conv2d(r_in, r_out, size, bias=False, **around),
                nn.Conv2d(r_out, c_out, 1, bias=has_bias),
            ]
        elif isinstance(spec, LowRank):
            parts = [
                nn.Conv2d(c_in, spec.rank, 1, bias=False, **around),
                nn.Conv2d(spec.rank, c_out, 1, bias=has_bias),
            ]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Sequential(*parts))
    return module


def fold_batch_norm(module: nn.Module) -> None:
    """Merges, in place, every BatchNorm into the convolution made before it.

    Args:
        module: A network in evaluation mode, whose layers were made in the order of the
            computation.
    """
    leaves = [(n, m) for n, m in module.named_modules() if not list(m.children())]
    for (name, conv), (after, norm) in itertools.pairwise(leaves):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            for place, layer in (
                (name, fuse_conv_bn_eval(conv, norm)),
                (after, nn.Identity()),
            ):
                parent, _, child = place.rpartition(".")
                setattr(module.get_submodule(parent), child, layer)


TORCH_MODELS: dict[str, Any] = {
    "lenet": LeNet,
    "resnet18": ResNet18,
    "simpledla": SimpleDLA,
    "vgg16": VGG16,
}
