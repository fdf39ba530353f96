"""The functions of this library for Linen models and for NNX modules."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
    runtime_checkable,
)

from flax import linen as nn

from inertia_jax.compression.inertial import make_inertial as _make_inertial
from inertia_jax.compression.recalibrate import recalibrate_batch_norm as _recalibrate
from inertia_jax.compression.reconstruct import reconstruct as _reconstruct
from inertia_jax.compression.tucker import compress as _compress
from inertia_jax.compression.tucker import decompress as _decompress
from inertia_jax.cost.count import count_cost as _count_cost
from inertia_jax.deploy.exported import save_exported as _save_exported
from inertia_jax.deploy.fold import fold_batch_norm as _fold_batch_norm
from inertia_jax.dropped import dropped_rules as _dropped_rules

if TYPE_CHECKING:
    from flax import nnx

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound="nnx.Module")
R = TypeVar("R", covariant=True)


@runtime_checkable  # for the tests, which check types at run time
class ChangingFunction(Protocol[P, R]):
    """A function that changes a network.

    It takes a Linen model and its variables, or an NNX module, which has its own. What
    it returns of a module is a module.
    """

    @overload
    def __call__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...
    @overload
    def __call__(self, model: M, *args: P.args, **kwargs: P.kwargs) -> M: ...


@runtime_checkable
class ReadingFunction(Protocol[P, R]):
    """A function that reads a Linen model or an NNX module."""

    def __call__(
        self, model: "nn.Module | nnx.Module", *args: P.args, **kwargs: P.kwargs
    ) -> R: ...


def _is_module(network: Any) -> bool:
    """Returns whether a network is an NNX module.

    Whoever has a module has imported NNX, which takes a quarter of a second.
    """
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(network, nnx.Module)


def _linen(model: Any) -> nn.Module:
    """Returns a Linen model.

    Raises:
        ValueError: It is something else, such as the class of a model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` (={model!r}) must be a Linen model or an nnx.Module."
        )
    return model


def _changing(
    function: Callable[Concatenate[nn.Module, Mapping[str, Any], P], R],
) -> ChangingFunction[P, R]:
    """Lets a function of a model and its variables take a module."""

    @functools.wraps(function)
    def changing(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_module(model):
            return function(_linen(model), *args, **kwargs)
        from inertia_jax.nnx import calls

        return calls.changed(function, model, args, kwargs)

    return cast(ChangingFunction[P, R], changing)


def _reading(function: Callable[Concatenate[nn.Module, P], R]) -> ReadingFunction[P, R]:
    """Lets a function of a model take a module."""

    @functools.wraps(function)
    def reading(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_module(model):
            return function(_linen(model), *args, **kwargs)
        from inertia_jax.nnx import calls

        return calls.read(function, model, args, kwargs)

    return cast(ReadingFunction[P, R], reading)


def _saving(save: F) -> F:
    """Lets a function of a path and a network take a module."""

    @functools.wraps(save)
    def saving(path: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_module(function):
            return save(path, function, *args, **kwargs)
        from inertia_jax.nnx import calls

        return calls.saved(save, path, function, args, kwargs)

    return cast(F, saving)


compress = _changing(_compress)
decompress = _changing(_decompress)
make_inertial = _changing(_make_inertial)
reconstruct = _changing(_reconstruct)
recalibrate_batch_norm = _changing(_recalibrate)
fold_batch_norm = _changing(_fold_batch_norm)
count_cost = _reading(_count_cost)
dropped_rules = _reading(_dropped_rules)
save_exported = _saving(_save_exported)
