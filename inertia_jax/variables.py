"""Variables of Linen models as dictionaries of arrays."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables as dictionaries of arrays.

    Mappings of any class become dictionaries, such as `FrozenDict`. Boxes are opened,
    such as the `nn.Partitioned` of `nn.with_partitioning`. The arrays stay themselves.

    Raises:
        ValueError: They are no collections of arrays, or shapes alone.
    """
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"`variables` (a {type(variables).__name__}) must be a dictionary of "
            f"collections, as `init` of a model returns it: {{'params': ...}}."
        )
    plain = without_boxes(variables)
    for path, leaf in jax.tree.leaves_with_path(plain):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`variables` must be arrays; {jax.tree_util.keystr(path)} is a shape "
                f"alone, {leaf}, as `jax.eval_shape` returns it."
            )
    return plain


def without_boxes(variables: Any) -> dict[str, Any]:
    """Returns variables, or their shapes, as dictionaries; boxes are opened."""

    def plain(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {name: plain(child) for name, child in node.items()}

    return dict(meta.unbox(plain(variables)))


def subtree(collection: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a layer's variables in one collection, {} if it has none there."""
    if not path:
        return dict(collection)
    for name, child in collection.items():
        # A name may have a "/" in it.
        rest = f"{path}/".removeprefix(f"{name}/").removesuffix("/")
        if rest != path and isinstance(child, Mapping):
            found = subtree(child, rest)
            if found:
                return found
    return {}
