"""NNX modules as Linen models with their variables, and back."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from inertia_jax.compression.planned import Planned
from inertia_jax.deploy.fold import Folded
from inertia_jax.nnx.bridges import bridge_to, read_bridge
from inertia_jax.nnx.equals import find_layers
from inertia_jax.nnx.folded import fold_into
from inertia_jax.nnx.forms import apply_plan, plan_of
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
    """
    if isinstance(module, nnx.bridge.ToNNX):
        return bridge_to(module, model, variables)
    folded: tuple[tuple[str, str], ...] = ()
    if isinstance(model, Folded):
        model, folded = model.unfolded, model.folded
    changed = apply_plan(module, plan_of_linen(model) or Plan())
    fold_into(changed, folded)
    for place, variable in iter_variables(changed, find_layers(changed)):
        variable.set_raw_value(value_at(variables, place))
    return changed
