"""The layers of an NNX module that Linen has, too, and their equals there."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from inertia_jax.layers.opaque import (
    OpaqueConv,
    OpaqueConvTranspose,
    OpaqueDense,
    OpaqueDenseGeneral,
    OpaqueEinsum,
)
from inertia_jax.nnx.graph import Path, iter_nodes
from inertia_jax.nnx.inertial import InertialConv
from inertia_jax.nnx.low_rank import LowRankConv, LowRankDense
from inertia_jax.nnx.tucker import Tucker2Conv

# A layer of a form that a plan chooses is an ordinary one to Linen, under that plan.
PLANNED = (Tucker2Conv, LowRankConv, InertialConv, LowRankDense)
_EQUALS: dict[type[nnx.Module], type[nn.Module]] = {
    nnx.Conv: nn.Conv,
    nnx.Linear: nn.Dense,
    nnx.BatchNorm: nn.BatchNorm,
    nnx.ConvTranspose: nn.ConvTranspose,
    nnx.LinearGeneral: nn.DenseGeneral,
    nnx.Einsum: nn.Einsum,
    **dict.fromkeys(PLANNED, nn.Conv),
    LowRankDense: nn.Dense,
}
_OPAQUE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv: OpaqueConv,
    nn.Dense: OpaqueDense,
    nn.ConvTranspose: OpaqueConvTranspose,
    nn.DenseGeneral: OpaqueDenseGeneral,
    nn.Einsum: OpaqueEinsum,
}
# What layers of NNX compute with, where nobody chose something else.
_USUAL: dict[str, Any] = {
    "promote_dtype": dtypes.promote_dtype,
    "preferred_element_type": None,
    "conv_general_dilated": lax.conv_general_dilated,
    "dot_general": lax.dot_general,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of an NNX module that Linen has, too.

    Attributes:
        node: The layer.
        path: Names along its path; those of its first place, if it has several.
        reason: The reason why Linen's layer cannot compute in its place, or None.
    """

    node: nnx.Module
    path: Path
    reason: str | None


def find_layers(module: nnx.Module) -> dict[Path, Layer]:
    """Returns the layers of a module that Linen has, too, by path, first to last."""
    nodes = list(iter_nodes(module))
    places = {id(n): path for path, n in nodes if isinstance(n, nnx.Variable)}
    holders = collections.Counter(
        id(value)
        for _, node in nodes
        if isinstance(node, nnx.Pytree)
        for value in vars(node).values()
        if isinstance(value, nnx.Variable)
    )
    planned = [path for path, node in nodes if isinstance(node, PLANNED)]
    layers: dict[Path, Layer] = {}
    for path, node in nodes:
        if _base(node) is None or any(path[:n] in planned for n in range(len(path))):
            continue
        reason = _own_way(node)
        for below, variable in iter_nodes(node):
            if not isinstance(variable, nnx.Variable):
                continue
            if places[id(variable)] != path + below or holders[id(variable)] > 1:
                reason = reason or "has parameters that are also used outside of it"
            if variable.get_metadata("on_get_value", None):
                reason = reason or "reads its parameters through a function"
        layers[path] = Layer(node, path, reason)
    return layers


def _base(node: Any) -> type[nnx.Module] | None:
    """Returns the class in `_EQUALS` that a layer is of; None for any other node."""
    return next((cls for cls in _EQUALS if isinstance(node, cls)), None)


def _own_way(node: Any) -> str | None:
    """Returns in what a layer computes otherwise than Flax does, or None."""
    if type(node) is not _base(node):
        return f"is a {type(node).__name__}, which may compute anything"
    if isinstance(node, nnx.LinearGeneral | nnx.Einsum):
        # Linen's equals have arguments of other kinds.
        name = type(node).__name__
        return f"is an nnx.{name}, of which there is no factorised form"
    for name, usual in _USUAL.items():
        if getattr(node, name, usual) is not usual:
            return f"computes in its own way ({name})"
    return None


def linen_fields(node: Any) -> tuple[type[nn.Module], dict[str, Any]]:
    """Returns the class of Linen's equal of a layer, and its fields."""
    base = _base(node)
    if base is None:
        raise ValueError(f"`node` (={type(node).__name__}) must be a layer of Linen.")
    cls = _EQUALS[base]
    own = {"parent", "name", *_USUAL}
    fields = {
        field.name: getattr(node, field.name)
        for field in dataclasses.fields(cls)
        if field.name not in own and hasattr(node, field.name)
    }
    if hasattr(node, "out_features"):
        fields["features"] = node.out_features
    if isinstance(node, nnx.LinearGeneral):
        fields["batch_dims"] = tuple(node.batch_axis)
    if isinstance(node, nnx.Einsum):
        fields["shape"] = node.kernel_shape
    return cls, fields


def linen_layer(
    node: Any, scope: Any, given: Mapping[str, Any] | None = None
) -> nn.Module:
    """Returns Linen's equal of a layer.

    Args:
        node: The layer.
        scope: The scope of its variables.
        given: The arguments of its call, by name; None where it is not called.
    """
    cls, fields = linen_fields(node)
    given = given or {}
    if cls is nn.BatchNorm and "x" in given:
        # The type of BatchNorm's output depends on its input.
        fields["dtype"] = output_type(node, given["x"])
    # Linen refuses what is given both to the layer and to its call.
    fields = {n: value for n, value in fields.items() if given.get(n) is None}
    return cls(**fields, parent=scope)


def opaque_layer(node: Any, scope: Any, call: Any, why: str) -> nn.Module | None:
    """Returns the layer of Linen that only stands for the call of a layer.

    Args:
        node: The layer.
        scope: The scope of its variables.
        call: The layer's call.
        why: The reason why nothing can stand in its place.

    Returns:
        The layer, or None for a layer without kernels.
    """
    cls, fields = linen_fields(node)
    if cls not in _OPAQUE:
        return None
    return _OPAQUE[cls](**fields, compute=call, why=why, parent=scope)


def output_type(norm: Any, x: Any) -> Any:
    """Returns the type that a BatchNorm of NNX returns `x` in.

    Those of its statistics count, too, which Linen's does not ask.
    """
    if norm.dtype is not None:
        return norm.dtype
    leaves = (norm.mean, norm.var, norm.scale, norm.bias)
    return jnp.result_type(x, *(leaf.dtype for leaf in leaves if leaf is not None))
