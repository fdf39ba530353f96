"""Reads trees of variables that Flax's users save, as weights by PyTorch's keys.

The two ways are a file of `flax.serialization`, and a folder of orbax.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from inertia_jax.weights.layout import torch_key, transposed

# Collections of variables, and the box of an NNX variable: no part of a layer's name.
_COLLECTIONS = ("params", "batch_stats", "thresholds")
_BOX = "value"
# What an optimiser keeps has the shapes and names of the weights.
_OPTIMISER = "opt_state"
# Compressed bytes that become more than so many times as many are no weights, even of
# an optimiser that has not begun.
_MAX_RATIO = 100


def is_msgpack(head: bytes) -> bool:
    """Tells whether a file begins with a mapping whose first key is a string."""
    sizes = {0xDE: 2, 0xDF: 4}  # bytes of the number of items after the first byte
    if not head or not (0x80 < head[0] < 0x90 or head[0] in sizes):
        return False
    key = head[1 + sizes.get(head[0], 0) :][:1]
    return bool(key) and (0xA0 <= key[0] <= 0xBF or key[0] in (0xD9, 0xDA))


def read_msgpack(content: bytes) -> dict[str, Any]:
    """Returns the weights in what `flax.serialization.to_bytes` returned."""
    return _by_torch_keys(serialization.msgpack_restore(content))


def read_orbax(path: pathlib.Path) -> dict[str, Any]:
    """Returns the weights in a tree that orbax has saved.

    Args:
        path: The folder of the tree, or one that holds it alone.

    Raises:
        ValueError: There is no such tree, more than one, or it declares more than can
            be in its files.
    """
    found = [
        p.parent for glob in ("", "*/", "*/*/") for p in path.glob(f"{glob}_METADATA")
    ]
    if not found:
        raise ValueError("it is a folder, but not one that orbax has written")
    if len(found) > 1:
        names = sorted(p.relative_to(path).as_posix() for p in found)
        listed = ", ".join([*names[:5], *["..."][: len(names) - 5]])
        raise ValueError(f"it holds several trees; name one of {listed}")
    folder = found[0].absolute()
    files = [entry for entry in folder.rglob("*") if not entry.is_dir()]
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file.relative_to(folder)} is no file")
    num_bytes = sum(file.stat().st_size for file in files)
    try:
        return _by_torch_keys(_restored(folder, num_bytes))
    except OSError as error:
        raise ValueError(f"a file of it is missing or damaged: {error}") from error


def _restored(folder: pathlib.Path, num_bytes: int) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        declared = sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(tree)
            if getattr(leaf, "shape", None)
        )
        if declared > _MAX_RATIO * num_bytes:
            raise ValueError(f"it declares {declared} bytes, and has {num_bytes}")
        # Arrays go to host memory, since the devices that wrote may not exist here.
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restore_args = jax.tree.map(lambda _: as_numpy, tree)
        arguments = ocp.args.PyTreeRestore(restore_args=restore_args)
        return checkpointer.restore(folder, args=arguments)


def _by_torch_keys(tree: Any) -> dict[str, Any]:
    """Returns a tree's arrays in PyTorch's layout by PyTorch's keys."""
    weights: dict[str, Any] = {}
    for path, value in _leaves(tree):
        names = [name for name in path if name not in _COLLECTIONS]
        if names[-1:] == [_BOX]:
            names = names[:-1]
        # What stands in no collection is a step, or a key.
        if len(path) == 1 or not names or _OPTIMISER in names:
            continue
        key = torch_key(names)
        if key in weights:
            raise ValueError(f"it has two values for {key}")
        weights[key] = transposed(value, to_torch_layout=True)
    return weights


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    rest: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while rest:
        path, node = rest.pop()
        if isinstance(node, Mapping):
            children = [((*path, str(name)), child) for name, child in node.items()]
            rest.extend(reversed(children))
        elif isinstance(node, (list, tuple)):
            rest.extend(((*path, str(i)), child) for i, child in enumerate(node))
        elif isinstance(node, (np.ndarray, jax.Array)):
            yield path, np.asarray(node)
