"""PyTorch's names and axes of variables."""

import re
from collections.abc import Sequence

import numpy as np

from inertia_jax.layers.kinds import KINDS

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# The parts of a factorised convolution, which is a Sequential in PyTorch.
_PARTS = {part: str(i) for kind in KINDS.values() for i, part in enumerate(kind.parts)}


def torch_key(path: Sequence[str]) -> str:
    """Returns the state-dict key of a variable, e.g. `layer1.0.conv1.weight`.

    Args:
        path: Module names and the variable's name, e.g. `("layer1_0", "conv1",
            "kernel")`; `name_N` stands for PyTorch's `name.N`, and the parts of a
            factorised convolution `name` for `name.0`, `name.1` and `name.2`.
    """
    *modules, leaf = path
    dotted = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    # A part owns its leaf. SimpleDLA's blocks `left` and `right` own none.
    dotted[-1:] = [_PARTS.get(name, name) for name in dotted[-1:]]
    return ".".join([*dotted, LEAVES.get(leaf, leaf)])


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that PyTorch's kernel has in place of one of Flax."""
    return tuple(shape[axis] for axis in _axes(len(shape), to_torch_layout=True))


def transposed(value: np.ndarray, *, to_torch_layout: bool) -> np.ndarray:
    """Returns a kernel as PyTorch or as Flax has it, and other arrays as they are."""
    axes = _axes(value.ndim, to_torch_layout=to_torch_layout)
    # PyTorch warns of arrays that cannot be written, so this is a copy.
    return np.array(np.transpose(value, axes), order="C")


def _axes(ndim: int, *, to_torch_layout: bool) -> tuple[int, ...]:
    """Returns the order of axes: [o, i, *sides] in PyTorch, [*sides, i, o] in Flax."""
    if ndim < 2:
        return tuple(range(ndim))
    if to_torch_layout:
        return (ndim - 1, ndim - 2, *range(ndim - 2))
    return (*range(2, ndim), 1, 0)
