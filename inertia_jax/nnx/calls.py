"""Calls functions of Linen models with what is read of NNX modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from inertia_jax.calls import ApplyFn
from inertia_jax.nnx.linen import as_linen, from_linen
from inertia_jax.nnx.view import LinenView

Function = Callable[..., Any]


def changed(
    function: Function, module: nnx.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> nnx.Module:
    """Returns the module that a function of a model and its variables makes of one.

    Raises:
        ValueError: There are variables besides the module, or the module is abstract.
    """
    if "variables" in kwargs or isinstance(next(iter(args), None), Mapping):
        raise ValueError(
            "`variables` must be left out with an nnx.Module, which holds its own."
        )
    if isinstance(kwargs.get("dense"), nnx.Module):
        kwargs = {**kwargs, "dense": as_linen(kwargs["dense"])}
    model, variables = as_linen(module)
    result = _call(function, (model, variables, *args), kwargs)
    network = result if isinstance(result, tuple) else (model, result)
    return from_linen(module, *network)


def read(
    function: Function, module: nnx.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Returns what a function of a model says of a module."""
    return _call(function, (as_linen(module)[0], *args), kwargs)


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
