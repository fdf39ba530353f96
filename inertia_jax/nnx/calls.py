"""Calls functions of Linen models with what is read of NNX modules."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from inertia_jax.calls import ApplyFn
from inertia_jax.compression.planned import Planned
from inertia_jax.compression.sites import find_kept
from inertia_jax.cost.count import count_cost, shape_of_input
from inertia_jax.inputs import Shape
from inertia_jax.nnx.graph import iter_nodes
from inertia_jax.nnx.linen import as_linen, from_linen
from inertia_jax.nnx.low_rank import LowRankDense
from inertia_jax.nnx.view import LinenView

Function = Callable[..., Any]


def changed(
    function: Function, module: nnx.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> nnx.Module:
    """Returns the module that a function of a model and its variables makes of one.

    Raises:
        ValueError: There are variables besides the module, or the module is abstract.
    """
    if "variables" in kwargs or _is_variables(next(iter(args), None)):
        raise ValueError(
            "`variables` must be left out with an nnx.Module, which holds its own."
        )
    if isinstance(kwargs.get("dense"), nnx.Module):
        kwargs = {**kwargs, "dense": as_linen(kwargs["dense"])}
    model, variables = as_linen(module)
    result = _call(function, (model, variables, *args), kwargs)
    network = result if isinstance(result, tuple) else (model, result)
    return from_linen(module, *network)


def _is_variables(given: Any) -> bool:
    """Returns whether an argument has variables, and not inputs by name."""
    if isinstance(given, nnx.State):
        return True
    if not isinstance(given, Mapping):
        return False
    return not given or bool({"params", "batch_stats"} & given.keys())


def read(
    function: Function, module: nnx.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Returns what a function of a model says of a module."""
    model, variables = as_linen(module)
    if function is count_cost and isinstance(model, Planned):
        linear = any(isinstance(node, LowRankDense) for _, node in iter_nodes(module))
        note = functools.partial(_with_reasons, variables=variables, linear=linear)
        model = _call(note, (model, *args), kwargs)
    return _call(function, (model, *args), kwargs)


def _with_reasons(
    model: Planned,
    input_shape: Shape,
    *,
    variables: Mapping[str, Any],
    linear: bool,
    apply_fn: ApplyFn | None = None,
    **_: Any,
) -> Planned:
    """Returns a model that knows why layers stay, which a module does not keep."""
    shape = shape_of_input(model, input_shape, apply_fn)
    kept = find_kept(model, variables, shape, apply_fn, linear=linear)[1]
    return model.clone(kept=tuple(kept.items()))


def saved(
    function: Function,
    path: Any,
    module: nnx.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a function of a path and a network with a module."""
    return _call(function, (path, as_linen(module), *args), kwargs)


def _call(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function with what was read of a module."""
    if kwargs.get("apply_fn") is not None:
        kwargs = {**kwargs, "apply_fn": _on_module(kwargs["apply_fn"])}
    return function(*args, **kwargs)


def _on_module(apply_fn: ApplyFn) -> ApplyFn:
    """Returns a function of the Linen model for one of the NNX module."""

    def call(model: Any, images: Any, train: bool) -> Any:
        if not isinstance(model, LinenView):
            return apply_fn(model, images, train)
        return model.run(lambda module: apply_fn(module, images, train), train=train)

    return call
