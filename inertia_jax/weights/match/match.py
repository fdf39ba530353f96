"""PyTorch's weights in the variables of any Flax model of the same shapes."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from inertia_jax.variables import without_boxes
from inertia_jax.weights.files import naming, read_weights
from inertia_jax.weights.found import weights_by_key
from inertia_jax.weights.layout import transposed as in_layout
from inertia_jax.weights.match.assign import assign
from inertia_jax.weights.match.flattening import (
    ImageShapes,
    channels_last,
    find_doubts,
    image_shapes,
)
from inertia_jax.weights.match.layers import Layer, flax_layers, torch_layers
from inertia_jax.weights.numbers import as_numbers

# Collections of Linen's variables. A tree without them has the layers at its top.
_COLLECTIONS = ("params", "batch_stats")
_MAX_DOUBTS = 8


@dataclasses.dataclass(frozen=True)
class TorchMatch:
    """Which weight of PyTorch each variable takes.

    Attributes:
        variables: The variables with PyTorch's numbers, in Flax's layout.
        pairs: The key of a weight by the path of its variable, e.g.
            `{"params/Conv_0/kernel": "conv1.weight"}`.

    Example:
        >>> from flax import linen as nn
        >>> shapes = jax.eval_shape(nn.Conv(4, (3, 3)).init, jax.random.key(0), images)
        >>> weights = {"stem.weight": np.ones((4, 1, 3, 3)), "stem.bias": np.zeros(4)}
        >>> ij.match_torch(shapes, weights).pairs["params/kernel"]
        'stem.weight'
    """

    variables: dict[str, Any] = dataclasses.field(repr=False)
    pairs: dict[str, str]

    def __str__(self) -> str:
        """Returns a line for each pair."""
        width = max(map(len, self.pairs), default=0)
        return "\n".join(f"{path:{width}}  {key}" for path, key in self.pairs.items())


def match_torch(
    variables: Mapping[str, Any],
    path_or_state_dict: str | pathlib.Path | Mapping[str, Any],
    *,
    pairs: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    transposed: Sequence[str] | None = None,
    flattened: ImageShapes | None = None,
    unflattened: ImageShapes | None = None,
) -> TorchMatch:
    """Pairs the weights of any PyTorch network with the variables of any Flax network.

    Layers are paired that have the same shapes: convolutions of any number of axes,
    ConvTranspose, linear layers, embeddings, normalisation with its statistics, and
    parameters of one's own. Where several have, names decide: equal ones, or series of
    one length that differ in their numbers alone, as `layer1.0.conv1` and
    `Block_0/Conv_0` do. Where they leave it open, nothing is guessed: the error lists
    the layers that remain, and `pairs` says which they are.

        match = ij.match_torch(variables, "resnet.pth", pairs={"Stem": "conv1"})
        print(match)                      # params/Stem/kernel  conv1.weight ...
        logits = model.apply(match.variables, images)

    PyTorch's order of the weights counts, since it shows what follows what; files of
    safetensors, and of an index, have none. Compare a few outputs of both networks:
    that two networks have the same shapes does not make them the same, as paddings and
    activations have no weights.

    Args:
        variables: The Flax network's variables, or their shapes (`jax.eval_shape`). A
            tree without collections will do, such as `nnx.to_pure_dict(state)`.
        path_or_state_dict: The weights, as `load_torch` takes them. All must have a
            place in the Flax network; delete from the state dict what has none. Of a
            file with several sets of weights, a warning says which are taken.
        pairs: PyTorch's names of layers, or of modules that hold layers, by paths of
            those of Flax: `{"Block_2": "layer2.0"}`.
        rename: New names of parts of PyTorch's keys, as in `load_torch`.
        transposed: Globs of the paths of `nn.ConvTranspose` (without
            `transpose_kernel`). None: those that names or shapes show.
        flattened: Shapes [h, w, c] of the images that Flax's linear layers flatten, by
            globs of their paths: `{"Dense_0": (7, 7, 64)}`; None for what is no image,
            or is flattened as PyTorch does. Asked for where shapes leave it open.
        unflattened: Shapes of the images that layers make in one row, by globs; also
            of those that BatchNorm, or another layer without a kernel, has in one row.

    Returns:
        The pairs, and the variables, which keep their structure and types.

    Raises:
        ValueError: Weights or variables are left over, or what is whose is ambiguous.
        FileNotFoundError: There is no such file.

    Example:
        >>> from flax import linen as nn
        >>> shapes = jax.eval_shape(nn.Conv(4, (3, 3)).init, jax.random.key(0), images)
        >>> weights = {"stem.weight": np.ones((4, 1, 3, 3)), "stem.bias": np.zeros(4)}
        >>> match = ij.match_torch(shapes, weights)
        >>> match.variables["params"]["kernel"].shape
        (3, 3, 1, 4)
    """
    flat = traverse_util.flatten_dict(without_boxes(variables))
    leaves = {tuple(map(str, path)): leaf for path, leaf in flat.items()}
    # Counters and keys have no counterpart in PyTorch.
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in leaves.items()
        if jax.numpy.issubdtype(leaf.dtype, np.floating)
    }
    ours = flax_layers(shapes, _COLLECTIONS if "params" in variables else ())
    flat_in = image_shapes("flattened", flattened or {}, ours)
    flat_out = image_shapes("unflattened", unflattened or {}, ours)
    loaded, file = read_weights(path_or_state_dict)
    with naming(file):
        chosen = weights_by_key(loaded, rename or {})
        weights = chosen.state
        theirs = torch_layers({key: weights[key].shape for key in weights})
        is_ordered = list(weights) != sorted(weights)
        assigned, flipped = assign(
            ours,
            theirs,
            pairs=pairs or {},
            transposed=transposed,
            is_ordered=is_ordered,
        )
        names = {other: name for name, other in assigned.items()}
        doubts = find_doubts(
            [ours[names[other]] for other in theirs],
            is_ordered=is_ordered,
            flattened=flat_in,
            unflattened=flat_out,
        )
        if doubts:
            listed = "\n  ".join(doubts[:_MAX_DOUBTS])
            raise ValueError(
                f"shapes do not tell whether these layers take or give an image in one "
                f"row, which PyTorch has as [c, h, w] and Flax as [h, w, c]. Say its "
                f"shape, or None where there is none (globs, e.g. {{'*': None}}, are "
                f"taken):\n  {listed}"
            )
        keys = _keys_by_path(ours, theirs, assigned)
        for name, layer in ours.items():
            for path in layer.leaves.values():
                key = keys[path]
                array = as_numbers(key, weights[key], tuple(weights[key].shape))
                if shape := flat_out.get(name):
                    array = channels_last(array, shape, axis=0)
                if path[-1] == "kernel" and (shape := flat_in.get(name)):
                    array = channels_last(array, shape, axis=1)
                if path[-1] == "kernel":
                    array = _in_flax_layout(array, is_transposed=name in flipped)
                like = leaves[path]
                array = array.reshape(like.shape).astype(like.dtype)
                leaves[path] = jax.numpy.asarray(array)
    if note := chosen.note(takes_ema=False):
        warnings.warn(f"{note}.", stacklevel=2)
    matched = {path: leaves[tuple(map(str, path))] for path in flat}
    return TorchMatch(
        traverse_util.unflatten_dict(matched),
        {"/".join(path): keys[path] for path in leaves if path in keys},
    )


def _keys_by_path(
    ours: Mapping[str, Layer], theirs: Mapping[str, Layer], assigned: Mapping[str, str]
) -> dict[tuple[str, ...], str]:
    """Returns the key of a weight by the path of the variable that takes it."""
    keys = {}
    for name, layer in ours.items():
        found = theirs[assigned[name]].leaves
        for leaf, path in layer.leaves.items():
            # A weight that stands alone may be called otherwise.
            keys[path] = found[leaf] if leaf in found else next(iter(found.values()))
    return keys


def _in_flax_layout(array: np.ndarray, *, is_transposed: bool) -> np.ndarray:
    """Returns a kernel of PyTorch as Flax has it."""
    if not is_transposed:
        return in_layout(array, to_torch_layout=False)
    # [i, o, *sides], and PyTorch's is the gradient of a convolution: it mirrors sides.
    mirrored = np.flip(array, tuple(range(2, array.ndim)))
    return np.moveaxis(mirrored, (0, 1), (-2, -1))
