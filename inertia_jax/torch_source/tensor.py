"""Expressions of PyTorch, whose axes may lie in another order than JAX's.

Images stay [n, c, h, w], and no operation moves numbers that PyTorch would not move by
itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inertia_jax.torch_source.program import Known


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An expression of PyTorch.

    Attributes:
        code: The expression; it needs no parentheses around it.
        shape: The shape of JAX's array.
        order: The axis of `shape` that each axis of the tensor is.
        sizes: The size of each axis of `shape` in the tensor: 1 where it is repeated.
    """

    code: str
    shape: tuple[Any, ...]
    order: tuple[int, ...]
    sizes: tuple[Any, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the axes are in JAX's order."""
        return self.order == tuple(range(len(self.order)))


def plain(code: str, shape: Sequence[Any]) -> Tensor:
    """Returns an expression whose axes are in JAX's order."""
    return Tensor(code, tuple(shape), tuple(range(len(shape))), tuple(shape))


def ordered(x: Tensor, order: Sequence[int]) -> Tensor:
    """Returns a tensor with its axes in another order."""
    order = tuple(order)
    if x.order == order:
        return x
    axes = tuple(x.order.index(axis) for axis in order)
    return dataclasses.replace(x, code=f"{x.code}.permute{axes}", order=order)


def member(name: str) -> str:
    """Returns the expression of a member, e.g. `self.layer1[0].conv1`."""
    code = "self"
    for part in name.split("."):
        code += f"[{part}]" if part.isdecimal() else f".{part}"
    return code


def bare(code: str) -> str:
    """Returns an expression without the parentheses around all of it."""
    depth = 0
    for place, letter in enumerate(code):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and place < len(code) - 1:
            return code
    return code[1:-1] if code.startswith("(") else code


def size_code(size: Any) -> str:
    """Returns a size as an argument; the number of images is -1."""
    return str(int(size)) if isinstance(size, int | np.integer) else "-1"


def index_code(part: slice | int | None, size: Any) -> str:
    """Returns an index of an axis; None is all of it."""
    if part is None:
        return ":"
    if isinstance(part, int):
        return str(part)
    start = str(part.start) if part.start else ""
    stop = "" if part.stop == size else str(part.stop)
    step = f":{part.step}" if part.step != 1 else ""
    return f"{start}:{stop}{step}"


def slices_of(
    params: Any, indices: Known, shape: tuple[Any, ...]
) -> dict[int, slice | int] | None:
    """Returns the slice, or the one place, of each axis that a gather indexes.

    None: It takes other places.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    places = np.broadcast_to(indices.value, indices.shape)
    count = places.ndim - 1
    found: dict[int, slice | int] = {}
    dims: list[int] = []
    for axis, size in enumerate(shape):
        is_indexed = axis in numbers.start_index_map
        if axis in numbers.operand_batching_dims:
            return None
        if not is_indexed and sizes[axis] == size:
            continue
        of_axis = np.zeros(places.shape[:-1], int)
        if is_indexed:
            of_axis = places[..., numbers.start_index_map.index(axis)]
        varying = [d for d in range(count) if np.ptp(of_axis, axis=d).any()]
        if axis not in numbers.collapsed_slice_dims:
            if varying or of_axis.size != 1:
                return None
            start = int(of_axis.flat[0])
            found[axis] = slice(start, start + int(sizes[axis]), 1)
        elif count == 0:
            found[axis] = int(of_axis)
        else:
            # Each axis of the indices is one of the image's.
            dim = varying[0] if varying else len(dims)
            if len(varying) > 1 or dim != len(dims) or dim >= count:
                return None
            dims.append(dim)
            line = np.moveaxis(of_axis, dim, 0).reshape(of_axis.shape[dim], -1)[:, 0]
            steps = {*np.diff(line).tolist()} or {1}
            if len(steps) > 1 or min(steps) < 1:
                return None
            found[axis] = slice(int(line[0]), int(line[-1]) + 1, steps.pop())
    return found if len(dims) == count or count == 0 else None


def reshaped_order(x: Tensor, shape: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Returns the order of the axes after a reshape that keeps axes where they lie.

    None: the numbers must be in JAX's order first.
    """
    groups: list[tuple[list[int], list[int]]] = []
    old, new = list(range(len(x.shape))), list(range(len(shape)))
    while old or new:
        left, right = ([old.pop(0)] if old else []), ([new.pop(0)] if new else [])
        while True:
            sizes = ([x.shape[axis] for axis in left], [shape[axis] for axis in right])
            if sizes[0] == sizes[1] or _product(sizes[0]) == _product(sizes[1]):
                break
            smaller = _is_smaller(sizes[0], sizes[1])
            if smaller is None:
                return None
            if smaller and old:
                left.append(old.pop(0))
            elif not smaller and new:
                right.append(new.pop(0))
            else:
                return None
        groups.append((left, right))
    # What is left over has a size of 1.
    order: list[int] = []
    for axis in x.order:
        left, right = next(group for group in groups if axis in group[0])
        if axis == left[0]:
            at = x.order.index(axis)
            if list(x.order[at : at + len(left)]) != left:
                return None
            order += right
    order += [axis for left, right in groups if not left for axis in right]
    return tuple(order)


def _product(sizes: Sequence[Any]) -> Any:
    return math.prod(sizes) if all(isinstance(s, int) for s in sizes) else tuple(sizes)


def _is_smaller(left: Sequence[Any], right: Sequence[Any]) -> bool | None:
    """Returns whether fewer numbers are on the left; None where that is a symbol."""
    if not all(isinstance(size, int) for size in (*left, *right)):
        return None
    return math.prod(left) < math.prod(right)
