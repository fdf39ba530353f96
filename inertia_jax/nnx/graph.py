"""The nodes of an NNX module, and what stands in their places."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

# The names along a path: of a module, or of a variable after that of its collection.
Path = tuple[str, ...]


def iter_nodes(module: Any) -> Iterator[tuple[Path, Any]]:
    """Yields nodes and variables with the names along their paths, each once.

    Places in lists are names, too. What is inside a module comes before it.
    """
    for path, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, nnx.Pytree | nnx.Variable):
            yield tuple(map(str, path)), node


def become(node: nnx.Module, other: nnx.Module) -> None:
    """Turns a module into another, wherever it is referred to."""
    node.__class__ = type(other)
    vars(node).clear()
    vars(node).update(vars(other))


def is_trained(module: nnx.Module) -> bool:
    """Returns whether a part of a module is in training mode."""
    return any(
        getattr(node, mode, True) is False
        for _, node in iter_nodes(module)
        for mode in ("deterministic", "use_running_average")
    )
