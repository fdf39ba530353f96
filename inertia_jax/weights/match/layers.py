"""The layers of two networks, and what PyTorch's layer for one of Flax looks like."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from inertia_jax.weights.layout import LEAVES, torch_shape

# The leaves of one layer of PyTorch. All others are layers by themselves.
_TORCH_LEAVES = ("weight", "bias", "running_mean", "running_var")
_FLAX_LEAVES = {**LEAVES, "embedding": "weight"}
# A weight that stands alone, whatever it is called.
_ALONE = "*"

# Names and shapes of a layer's weights in PyTorch.
Signature = frozenset[tuple[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of one of the networks.

    Attributes:
        name: Its name: `layer1.0.conv1` in PyTorch, `layer1_0/conv1` in Flax.
        leaves: Paths of its variables, or keys of its weights, by PyTorch's names of
            leaves.
        shapes: Their shapes, by the same names.
        kernel: The shape of its kernel in Flax, [*sides, i, o]; None without one.
    """

    name: str
    leaves: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    kernel: tuple[int, ...] | None = None

    def signature(self, *, transposed: bool = False) -> Signature:
        """Returns what PyTorch's layer has, if a kernel is one of a ConvTranspose."""
        shapes = dict(self.shapes)
        if transposed and self.kernel is not None:
            *sides, c_in, c_out = self.kernel
            shapes["weight"] = (c_in, c_out, *sides)
        (leaf, shape), *rest = shapes.items()
        if not rest and (leaf == _ALONE or len(shape) < 2):
            return frozenset({(_ALONE, tuple(n for n in shape if n != 1))})
        return frozenset(shapes.items())


def torch_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """Returns PyTorch's layers by name, of the shapes of weights by key."""
    layers: dict[str, Layer] = {}
    for key, shape in shapes.items():
        name, _, leaf = key.rpartition(".")
        if leaf not in _TORCH_LEAVES:
            name, leaf = key, _ALONE
        layer = layers.setdefault(name, Layer(name, {}, {}))
        layer.leaves[leaf] = key
        layer.shapes[leaf] = tuple(shape)
    return layers


def flax_layers(
    shapes: Mapping[tuple[str, ...], tuple[int, ...]], collections: Collection[str]
) -> dict[str, Layer]:
    """Returns the layers of Flax by name, of the shapes of variables by path."""
    layers: dict[str, Layer] = {}
    for path, shape in shapes.items():
        names = path[1:] if path[0] in collections else path
        leaf = _FLAX_LEAVES.get(names[-1], _ALONE)
        name = "/".join(names if leaf == _ALONE else names[:-1])
        is_kernel = names[-1] == "kernel" and len(shape) > 1
        if name not in layers:
            layers[name] = Layer(name, {}, {})
        if is_kernel:
            kernel = tuple(shape)
            layers[name] = dataclasses.replace(layers[name], kernel=kernel)
        layers[name].leaves[leaf] = path
        layers[name].shapes[leaf] = torch_shape(shape) if is_kernel else tuple(shape)
    return layers


def in_words(signature: Signature) -> str:
    """Returns the shapes of a layer, for an error."""
    return ", ".join(f"{leaf} {shape}" for leaf, shape in sorted(signature))


def shortened(names: Iterable[str], *, most: int = 4) -> str:
    """Returns the first of some names."""
    listed = [name or "(the network itself)" for name in names]
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f", {more} more" if more > 0 else "")
