"""Variables of NNX modules in the places that Linen has for them."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx.variablelib import variable_name_from_type

from inertia_jax.nnx.graph import Path, iter_nodes


@nnx.register_variable_name("thresholds", overwrite=True)
class GateThreshold(nnx.Variable[Any]):
    """A friction threshold that no gradient trains.

    Example:
        >>> from flax import nnx
        >>> layer = ij.nnx.InertialConv(
        ...     1,
        ...     4,
        ...     (3, 3),
        ...     reading="tiled",
        ...     threshold=ij.Fixed(0.25),
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> jax.tree.leaves(nnx.state(layer, ij.nnx.GateThreshold))[0].item()
        0.25
    """


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
    nodes = list(iter_nodes(module))
    bridges = {path for path, node in nodes if isinstance(node, nnx.bridge.ToNNX)}
    for path, node in nodes:
        if not isinstance(node, nnx.Variable):
            continue
        if isinstance(node.get_raw_value(), _ARRAYS):
            above = [path[:n] for n in range(len(path))]
            collection = _collection(node, in_layer=any(p in layers for p in above))
            # The rest of a bridge's attributes are its own, and not the model's.
            if any(
                p in bridges and not path[len(p)].startswith("to_nnx__") for p in above
            ):
                collection = variable_name_from_type(type(node))
            yield (collection, *path), node


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
