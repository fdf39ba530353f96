"""NNX modules as Linen models with their variables, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from inertia_jax.compression.planned import Planned
from inertia_jax.deploy.fold import Folded
from inertia_jax.nnx.bridges import (
    bridge_to,
    find_bridges,
    read_bridge,
    with_plan,
)
from inertia_jax.nnx.equals import find_layers
from inertia_jax.nnx.folded import fold_into, pairs_below
from inertia_jax.nnx.forms import plan_of, with_forms
from inertia_jax.nnx.graph import become
from inertia_jax.nnx.variables import iter_variables, value_at
from inertia_jax.nnx.view import LinenView, Source
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.plan import plan_of as plan_of_linen


def as_linen(module: nnx.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Reads an NNX module as a Linen model and its variables.

    Layers and variables have the paths that they have in the module: the kernel of
    `module.layers[0].conv` is `layers/0/conv/kernel` in `params`. The collections are
    `params`, `batch_stats`, `thresholds` and, of other variables, the names of their
    classes. All functions of this library take the pair; what they return, `from_linen`
    turns into a module again.

    Args:
        module: The module; it is not changed.

    Raises:
        ValueError: The module is abstract, as from `nnx.eval_shape`.

    Example:
        >>> from flax import nnx
        >>> net = nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)))
        >>> _, arrays = ij.nnx.as_linen(net)
        >>> arrays["params"]["layers"]["0"]["kernel"].shape
        (3, 3, 1, 4)
    """
    if isinstance(module, nnx.bridge.ToNNX):
        return read_bridge(module)
    source, plan = Source(module), plan_of(module)
    variables = source.variables()
    if any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)
    ):
        raise ValueError(
            f"`module` (={type(module).__name__}) is abstract; its variables must be "
            f"arrays."
        )
    # Errors name the class of the module.
    view = type(type(module).__name__, (LinenView,), {})(source)
    return Planned(view, plan) if plan.rules else view, variables


def from_linen(
    module: nnx.Module, model: nn.Module, variables: Mapping[str, Any]
) -> nnx.Module:
    """Returns a module with the layers and variables of a Linen model.

    Args:
        module: The module that `as_linen` has read; it is not changed.
        model: The model, or what a function of this library made of it.
        variables: The model's variables.

    Returns:
        A module of the same class, of which only those layers are others that the model
        has others for.

    Raises:
        ValueError: Variables of another model.

    Example:
        >>> from flax import nnx
        >>> net = nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)))
        >>> linen, arrays = ij.nnx.as_linen(net)
        >>> zeros = jax.tree.map(jnp.zeros_like, arrays)
        >>> ij.nnx.from_linen(net, linen, zeros)(images).any().item()
        False
    """
    if isinstance(module, nnx.bridge.ToNNX):
        return bridge_to(module, model, variables)
    folded: tuple[tuple[str, str], ...] = ()
    if isinstance(model, Folded):
        model, folded = model.unfolded, model.folded
    plan = plan_of_linen(model) or Plan()
    changed = with_forms(module, plan, nnx.Rngs(0))
    for path, bridge in find_bridges(changed).items():
        linen = with_plan(bridge.to_nnx__module, plan.below(path))
        if pairs := pairs_below(folded, path):
            linen = Folded(linen, pairs)
        inside = {name: value_at(variables, (name, *path)) for name in variables}
        become(bridge, bridge_to(bridge, linen, inside))
    fold_into(changed, folded)
    for place, variable in iter_variables(changed, find_layers(changed)):
        value, shape = value_at(variables, place), variable.get_raw_value().shape
        if value is None or np.shape(value) != shape:
            found = "missing" if value is None else np.shape(value)
            raise ValueError(
                f"`variables` do not belong to `model`: {'/'.join(place)} is {found}, "
                f"must be {shape}."
            )
        variable.set_raw_value(value)
    return changed
