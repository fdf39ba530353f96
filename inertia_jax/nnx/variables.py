"""Variables of NNX modules in the places that Linen has for them."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from inertia_jax.nnx.graph import Path, iter_nodes


@nnx.register_variable_name("thresholds", overwrite=True)
class GateThreshold(nnx.Variable[Any]):
    """A friction threshold that no gradient trains."""


# The classes of variables in Linen's collections.
CLASSES: dict[str, type[nnx.Variable[Any]]] = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "thresholds": GateThreshold,
}
# An abstract module has no arrays yet.
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def iter_variables(
    module: Any, layers: Collection[Path] = ()
) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    """Yields the places in Linen of a module's variables, and the variables.

    Variables of other values than one array are left out: they are constants to Linen,
    as are arrays that are no variables.

    Args:
        module: The module.
        layers: Paths of layers that Linen has, too. Their parameters are in `params`
            whatever class of variables they have.
    """
    for path, node in iter_nodes(module):
        if not isinstance(node, nnx.Variable):
            continue
        if isinstance(node.get_raw_value(), _ARRAYS):
            in_layer = any(path[:n] in layers for n in range(len(path)))
            yield (_collection(node, in_layer=in_layer), *path), node


def _collection(variable: nnx.Variable[Any], *, in_layer: bool) -> str:
    for name, cls in CLASSES.items():
        if isinstance(variable, cls):
            return name
    return "params" if in_layer else type(variable).__name__


def value_at(variables: Any, place: Path) -> Any:
    """Returns what stands at a place in Linen's variables; None if nothing does."""
    node = variables
    for name in place:
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def put_at(variables: dict[str, Any], place: Path, value: Any) -> None:
    """Puts a value at a place in Linen's variables."""
    *path, name = place
    for key in path:
        variables = variables.setdefault(key, {})
    variables[name] = value
