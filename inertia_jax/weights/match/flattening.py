"""Layers whose inputs or outputs are an image in one row.

PyTorch flattens [c, h, w], Flax [h, w, c], so that the numbers of such a layer must
change places. Shapes show that a layer may be one, and not the sides of the image.
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence

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
    flattened: ImageShapes,
    unflattened: ImageShapes,
) -> list[str]:
    """Returns a sentence for each layer that may flatten an image, or make one.

    A layer without a kernel, such as BatchNorm, may stand behind a layer that makes one
    row of an image, or before one that makes an image of a row.

    Args:
        layers: The layers of Flax, in the order that PyTorch's have.
        is_ordered: Whether that is the order of the network. If not, more is doubted.
        flattened: What layers flatten, as far as it is known, by name.
        unflattened: What layers make, as far as it is known.
    """
    said = {}
    kernels = [layer for layer in layers if _has_kernel(layer)]
    # Channels of what linear layers take and make that may be an image.
    taken = {name: shape[-1] for name, shape in flattened.items() if shape}
    given = {name: shape[-1] for name, shape in unflattened.items() if shape}
    for i, layer in enumerate(kernels):
        c_in = _axis_size(layer, -2)
        known = _features_before(layer, layers, is_ordered=is_ordered)
        before = kernels[:i] if is_ordered else kernels
        if not _is_convolution(layer) and c_in not in known:
            channels = [_features(x) for x in before if _is_convolution(x)]
            fitting = [c for c in channels if c_in % c == 0]
            if fitting and layer.name not in flattened:
                c = fitting[-1] if is_ordered else max(fitting)
                taken[layer.name] = c
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
                    given[x.name] = c_in
                    said[x.name] = _sentence(x, "gives", size, c_in)
    for layer in layers:
        if not _is_norm(layer) or layer.name in unflattened:
            continue
        find = _channels_in_order if is_ordered else _channels_anywhere
        channels_there = find(layer, layers, taken, given)
        if channels_there is not None:
            size = _features(layer)
            said[layer.name] = _sentence(layer, "gives", size, channels_there)
    return [said[layer.name] for layer in layers if layer.name in said]


def _channels_in_order(
    norm: Layer,
    layers: Sequence[Layer],
    taken: Mapping[str, int],
    given: Mapping[str, int],
) -> int | None:
    """Returns the channels of an image that a norm may have in one row, or None.

    Args:
        norm: A layer without a kernel.
        layers: All layers, in the order of the network.
        taken: Channels of images that linear layers may take, by name.
        given: Channels of those that linear layers may make.
    """
    i, size = layers.index(norm), _features(norm)
    before = [x for x in layers[:i] if _has_kernel(x)]
    after = next((x for x in layers[i:] if _has_kernel(x)), None)
    if before and before[-1].name in given and _features(before[-1]) == size:
        return given[before[-1].name]
    convolutions = [x for x in before if _is_convolution(x)]
    known = _features_before(norm, layers, is_ordered=True)
    if not convolutions or size in known or size % _features(convolutions[-1]):
        return None
    if after is not None and _is_convolution(after):
        # One that takes as many channels, of several images side by side, or apart.
        if size in (_axis_size(after, -2), _features(after)):
            return None
    elif after is not None and _axis_size(after, -2) == size:
        return taken.get(after.name)
    return _features(convolutions[-1])


def _channels_anywhere(
    norm: Layer,
    layers: Sequence[Layer],
    taken: Mapping[str, int],
    given: Mapping[str, int],
) -> int | None:
    """Returns what `_channels_in_order` does, where the order is not known."""
    size = _features(norm)
    kernels = [x for x in layers if _has_kernel(x)]
    convolutions = [x for x in kernels if _is_convolution(x)]
    linear = [x for x in kernels if not _is_convolution(x)]
    for x in linear:
        if x.name in given and _features(x) == size:
            return given[x.name]
    takers = [x for x in linear if _axis_size(x, -2) == size]
    for x in takers:
        if x.name in taken:
            return taken[x.name]
    fitting = [c for c in map(_features, convolutions) if size % c == 0]
    known = {_features(x) for x in kernels} | {_axis_size(x, -2) for x in convolutions}
    return max(fitting) if fitting and not takers and size not in known else None


def _features_before(
    layer: Layer, layers: Sequence[Layer], *, is_ordered: bool
) -> set[int]:
    """Returns the numbers of features that a layer may take as they are.

    Those of a norm do not count: it may itself have an image in one row.
    """
    if is_ordered:
        # Those of the last layer with a kernel, which for a linear layer may be any
        # after the last convolution, and of what follows it.
        before = layers[: layers.index(layer)]
        is_start = _is_convolution if not _is_convolution(layer) else _has_kernel
        starts = [i for i, x in enumerate(before) if is_start(x)]
        following = before[max(starts, default=0) :]
        return {_features(x) for x in following if not _is_norm(x)}
    return {
        _features(x)
        for x in layers
        if not _is_norm(x)
        and (not _has_kernel(x) or _is_convolution(x) or _is_earlier(x, layer))
    }


def _is_earlier(layer: Layer, other: Layer) -> bool:
    """Tells whether the names of two layers are a series, in this order."""
    names = (layer.name, other.name)
    numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in names]
    words = {re.sub(r"\d+", "#", name) for name in names}
    return len(words) == 1 and numbers[0] < numbers[1]


def _has_kernel(layer: Layer) -> bool:
    return layer.kernel is not None


def _is_norm(layer: Layer) -> bool:
    """Tells whether a layer has numbers by feature alone, as BatchNorm does."""
    return not _has_kernel(layer) and max(map(len, layer.shapes.values())) < 2


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
