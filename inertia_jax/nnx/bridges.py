"""Linen models inside NNX modules (`nnx.bridge.ToNNX`), their variables and plans."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from flax.nnx.bridge.variables import (
    linen_vars_to_nnx_attrs,
    nnx_attrs_to_linen_vars,
)

from inertia_jax.compression.planned import Planned
from inertia_jax.models.create import check_plan, init_variables, input_shape
from inertia_jax.models.network import Network
from inertia_jax.nnx.graph import Path, iter_nodes
from inertia_jax.plan.plan import Plan, plan_of
from inertia_jax.variables import plain_variables

# How the names of a bridge's own attributes begin. The others are the variables of the
# model.
OWN = "to_nnx__"


def find_bridges(module: nnx.Module) -> dict[Path, nnx.bridge.ToNNX]:
    """Returns the Linen models inside a module, in their bridges, by path."""
    return {
        path: node
        for path, node in iter_nodes(module)
        if isinstance(node, nnx.bridge.ToNNX)
    }


def unplanned(model: nn.Module) -> nn.Module:
    """Returns a Linen model without its plan."""
    if isinstance(model, Planned):
        return model.unplanned
    return model.clone(plan=Plan()) if isinstance(model, Network) else model


def with_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Returns a Linen model with another plan."""
    if plan == (plan_of(model) or Plan()):
        return model
    return Planned(model, plan) if plan_of(model) is None else model.clone(plan=plan)


def read_bridge(bridge: nnx.bridge.ToNNX) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the Linen model inside a module, and its variables."""
    leaves = nnx_attrs_to_linen_vars(_attributes(bridge))
    return bridge.to_nnx__module, plain_variables(leaves)


def bridge_to(
    bridge: nnx.bridge.ToNNX, model: nn.Module, variables: Mapping[str, Any]
) -> nnx.bridge.ToNNX:
    """Returns a module like this one of another model; this one is not changed."""
    made = nnx.clone(bridge, graph=True)
    for name in _attributes(made):
        delattr(made, name)
    made.to_nnx__module = model
    own = {
        collection: {n: v for n, v in leaves.items() if not n.startswith(OWN)}
        for collection, leaves in variables.items()
        if isinstance(leaves, Mapping)
    }
    for name, value in linen_vars_to_nnx_attrs(own).items():
        setattr(made, name, nnx.data(value))
    return made


def bridge_with_plan(
    bridge: nnx.bridge.ToNNX, plan: Plan, rngs: nnx.Rngs
) -> nnx.bridge.ToNNX:
    """Returns a network of this library with another plan.

    Variables stay that have their places and shapes in both forms; others are new.

    Raises:
        ValueError: The model is another's, or a rule matches no convolution.
    """
    model, variables = read_bridge(bridge)
    if not isinstance(model, Network):
        raise ValueError(
            f"`module` holds a {type(model).__name__} of Linen; must be a network of "
            f"ij.nnx.create_model. Apply the plan to the model by ij.Planned."
        )
    planned = model.clone(plan=plan)
    check_plan(planned, input_shape(model), strict=False)
    drawn = traverse_util.flatten_dict(init_variables(planned, rngs.params()))
    own = traverse_util.flatten_dict(variables)
    for place, leaf in drawn.items():
        if place in own and np.shape(own[place]) == leaf.shape:
            drawn[place] = own[place]
    return bridge_to(bridge, planned, traverse_util.unflatten_dict(drawn))


def _attributes(bridge: nnx.bridge.ToNNX) -> dict[str, Any]:
    """Returns the variables that a module has of the Linen model inside it."""
    own = (OWN, "_pytree__")
    return {n: value for n, value in vars(bridge).items() if not n.startswith(own)}
