"""Linear layers whose inputs or outputs are an image in one row.

PyTorch flattens [c, h, w], Flax [h, w, c], so that the numbers of such a layer must
change places. Shapes show that a layer may be one, and not the sides of the image.
"""

import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from inertia_jax.weights.match.layers import Layer

# The shape [*sides, c] that a layer flattens or makes; None for a layer that does not.
ImageShapes = Mapping[str, tuple[int, ...] | None]

# An input of so few channels may be an image.
_MAX_COLOURS = 4


def find_doubts(
    layers: Sequence[Layer],
    *,
    is_ordered: bool,
    flattened: Collection[str],
    unflattened: Collection[str],
) -> list[str]:
    """Returns a sentence for each layer that may flatten an image, or make one.

    Args:
        layers: The layers of Flax, in the order that PyTorch's have.
        is_ordered: Whether that is the order of the network. If not, more is doubted.
        flattened: Names of layers of which is known what they flatten.
        unflattened: Names of those of which is known what they make.
    """
    said = {}
    kernels = [layer for layer in layers if _has_kernel(layer)]
    for i, layer in enumerate(kernels):
        c_in = _axis_size(layer, -2)
        known = _features_before(layer, layers, is_ordered=is_ordered)
        before = kernels[:i] if is_ordered else kernels
        if not _is_convolution(layer) and c_in not in known:
            channels = [_features(x) for x in before if _is_convolution(x)]
            fitting = [c for c in channels if c_in % c == 0]
            if fitting and layer.name not in flattened:
                c = fitting[-1] if is_ordered else max(fitting)
                said[layer.name] = _sentence(layer, "takes", c_in, c)
        # A depthwise convolution has kernels of one input.
        may_be_made = c_in not in known and c_in > 1
        if not is_ordered:
            may_be_made = c_in > _MAX_COLOURS
        if _is_convolution(layer) and may_be_made:
            for x in before[-1:] if is_ordered else before:
                size = _features(x)
                is_made = not _is_convolution(x) and size > c_in and size % c_in == 0
                if is_made and x.name not in unflattened:
                    said[x.name] = _sentence(x, "gives", size, c_in)
    return list(said.values())


def _features_before(
    layer: Layer, layers: Sequence[Layer], *, is_ordered: bool
) -> set[int]:
    """Returns the numbers of features that a layer may take as they are."""
    if is_ordered:
        # Those of the last layer with a kernel, which for a linear layer may be any
        # after the last convolution, and of what follows it.
        before = layers[: layers.index(layer)]
        is_start = _is_convolution if not _is_convolution(layer) else _has_kernel
        starts = [i for i, x in enumerate(before) if is_start(x)]
        return {_features(x) for x in before[max(starts, default=0) :]}
    return {
        _features(x)
        for x in layers
        if not _has_kernel(x) or _is_convolution(x) or _is_earlier(x, layer)
    }


def _is_earlier(layer: Layer, other: Layer) -> bool:
    """Tells whether the names of two layers are a series, in this order."""
    names = (layer.name, other.name)
    numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in names]
    words = {re.sub(r"\d+", "#", name) for name in names}
    return len(words) == 1 and numbers[0] < numbers[1]


def _has_kernel(layer: Layer) -> bool:
    return layer.kernel is not None


def _is_convolution(layer: Layer) -> bool:
    return len(layer.kernel or ()) > 2


def image_shapes(
    argument: str, images: ImageShapes, layers: Mapping[str, Layer]
) -> dict[str, tuple[int, ...] | None]:
    """Returns shapes by names of layers, of shapes by globs; the first one wins.

    Raises:
        ValueError: A glob matches no layer, or one that has not as many numbers.
    """
    found: dict[str, tuple[int, ...] | None] = {}
    for glob, shape in images.items():
        names = [name for name in layers if fnmatch.fnmatchcase(name, glob)]
        if not names:
            raise ValueError(f"`{argument}` has {glob!r}, which matches no layer.")
        for name in names:
            size = _axis_size(layers[name], -2 if argument == "flattened" else -1)
            if shape is not None and math.prod(shape) != size:
                raise ValueError(
                    f"`{argument}` has the shape {shape} for {name}; must have {size} "
                    f"numbers."
                )
            found.setdefault(name, shape)
    return found


def _axis_size(layer: Layer, axis: int) -> int:
    shape = layer.kernel or next(iter(layer.shapes.values()))
    return shape[axis] if len(shape) >= -axis else 1


def _features(layer: Layer) -> int:
    return _axis_size(layer, -1)


def _sentence(layer: Layer, verb: str, size: int, channels: int) -> str:
    argument = {"takes": "flattened", "gives": "unflattened"}[verb]
    side = math.isqrt(size // channels)
    shape = (side, side, channels) if side**2 * channels == size else "(h, w, c)"
    return (
        f"{layer.name} {verb} {size} numbers, which may be an image of {channels} "
        f"channels: `{argument}={{{layer.name!r}: {shape}}}`"
    )


def channels_last(
    weight: np.ndarray, shape: tuple[int, ...], *, axis: int
) -> np.ndarray:
    """Returns a weight of PyTorch whose axis is in the order [*sides, c] of Flax.

    Args:
        weight: A weight whose axis is in the order [c, *sides].
        shape: The shape [*sides, c].
        axis: The axis.
    """
    *sides, channels = shape
    split = weight.shape[:axis], weight.shape[axis + 1 :]
    apart = weight.reshape(*split[0], channels, *sides, *split[1])
    return np.moveaxis(apart, axis, axis + len(sides)).reshape(weight.shape)
