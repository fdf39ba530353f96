"""Calls functions of Linen models with what is read of NNX modules."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from inertia_jax.calls import ApplyFn, apply_network
from inertia_jax.nnx.linen import as_linen, from_linen
from inertia_jax.nnx.view import LinenView

Function = Callable[..., Any]


def changed(
    function: Function, module: nnx.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> nnx.Module:
    """Returns the module that a function of a model and its variables makes of one.

    Raises:
        ValueError: There are variables besides the module, the module is abstract, or
            it cannot be called on such images.
    """
    if "variables" in kwargs or isinstance(next(iter(args), None), Mapping):
        raise ValueError(
            "`variables` must be left out with an nnx.Module, which holds its own."
        )
    if isinstance(kwargs.get("dense"), nnx.Module):
        kwargs = {**kwargs, "dense": as_linen(kwargs["dense"])}
    model, variables = as_linen(module)
    result = _call(function, module, (model, variables, *args), kwargs)
    network = result if isinstance(result, tuple) else (model, result)
    return from_linen(module, *network)


def read(
    function: Function, module: nnx.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Returns what a function of a model says of a module."""
    return _call(function, module, (as_linen(module)[0], *args), kwargs)


def saved(
    function: Function,
    path: Any,
    module: nnx.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a function of a path and a network with a module."""
    return _call(function, module, (path, as_linen(module), *args), kwargs)


def _call(
    function: Function, module: nnx.Module, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Calls a function with what was read of a module."""
    if kwargs.get("apply_fn") is not None:
        kwargs = {**kwargs, "apply_fn": _on_module(kwargs["apply_fn"])}
    try:
        return function(*args, **kwargs)
    except Exception:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        _check_call(module, given)
        raise


def _on_module(apply_fn: ApplyFn) -> ApplyFn:
    """Returns a function of the Linen model for one of the NNX module."""

    def call(model: Any, images: Any, train: bool) -> Any:
        if not isinstance(model, LinenView):
            return apply_fn(model, images, train)
        return model.run(lambda module: apply_fn(module, images, train), train=train)

    return call


def _check_call(module: nnx.Module, given: Mapping[str, Any]) -> None:
    """Checks that a module can be called on the images that a function was given.

    Raises:
        ValueError: It cannot; the text has the module's own error.
    """
    arrays = (given.get(name) for name in ("calibration", "images"))
    shapes = [given.get(name) for name in ("image_shape", "input_shape")]
    shapes += [np.shape(array) for array in arrays if array is not None]
    shape = next((shape for shape in shapes if shape is not None), None)
    if shape is None:
        return
    model, variables = as_linen(module)
    images = jax.ShapeDtypeStruct((1, *shape[-3:]), jnp.float32)
    call = functools.partial(apply_network, model, apply_fn=given.get("apply_fn"))
    try:
        jax.eval_shape(call, variables, images)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be called on images of shape "
            f"{images.shape}. (If it is called in another way than `module(images)`, "
            f"say how with `apply_fn`, a function of (module, images, train).) Its own "
            f"error: {error}"
        ) from error
