"""Answers the calls of a network's layers, so that no model is edited."""

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import numpy as np
from flax import linen as nn

# A function of (module, path, call, args, kwargs) that returns a layer's output:
# `call(*args, **kwargs)`, or what takes its place.
Answer = Callable[[Any, str, Callable[..., Any], Any, Any], Any]

# Arguments by which networks are told that they are trained, and their values then.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class Wrapper(nn.Module):
    """A module that stands around a network, and is called as the network is.

    It takes `train`, too, for a network that takes none of the arguments by which it
    would be told that it is trained.
    """

    @property
    def wrapped(self) -> nn.Module:
        """The network."""
        raise NotImplementedError

    @nn.nowrap
    def make_answer(self, *, train: bool) -> Answer:
        """Returns what answers the calls of the network's layers.

        Args:
            train: Whether the network is called in training mode.
        """
        raise NotImplementedError

    @nn.nowrap
    @contextlib.contextmanager
    def inside(self, *, train: bool = False) -> Iterator[nn.Module]:
        """Gives the network, whose layers are answered inside the `with` block.

        The wrapper must be bound to variables, and so is the network. Methods of the
        network other than `__call__` are called in this way.

        Args:
            train: Whether the layers that the wrapper makes are trained.
        """
        names = [field.name for field in dataclasses.fields(self) if field.init]
        fields = [getattr(self, name) for name in names if name != "parent"]
        own = [field for field in fields if field is not self.wrapped]
        key = hash((type(self), train, *own))
        answer = self.make_answer(train=train)
        with on_calls(answer, key=key, scope=self.scope):
            yield on_scope(self.wrapped, self.scope)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = self.wrapped
        while isinstance(network, Wrapper):
            network = network.wrapped
        train = _trains(network, args, kwargs)
        if "train" in kwargs and not mode_names(network):
            kwargs.pop("train")
        with self.inside(train=train) as network:
            return network(*args, **kwargs)


def mode_names(model: nn.Module) -> list[str]:
    """Returns the arguments by which a call tells the network that it is trained."""
    taken = inspect.signature(type(model).__call__).parameters
    # An argument that is also a field must be given in one place only.
    return [n for n in MODES if n in taken and getattr(model, n, None) is None]


def _trains(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether a call, or else a field of the network, says that it is trained.

    What is no constant of the call, such as a traced boolean, says nothing.
    """
    taken = inspect.signature(type(model).__call__)
    try:
        given = taken.bind_partial(model, *args, **kwargs)
    except TypeError:  # the network refuses it, or takes no `train`
        train = kwargs.get("train")
        return isinstance(train, bool | np.bool_) and bool(train)
    said = _modes(given.arguments)
    if not said:  # by this call, that is
        given.apply_defaults()
        fields = {name: getattr(model, name, None) for name in MODES}
        said = _modes(fields) | _modes(given.arguments)
    return any(value == MODES[name] for name, value in said.items())


def _modes(values: Mapping[str, Any]) -> dict[str, bool | np.bool_]:
    """Returns those of `MODES` that have a constant value."""
    found = {name: values.get(name) for name in MODES}
    return {n: v for n, v in found.items() if isinstance(v, bool | np.bool_)}


def on_scope(model: nn.Module, scope: Any) -> nn.Module:
    """Returns the model in the scope of a module that wraps it, under its own paths.

    `nn.share_scope` would leave the paths of modules that are fields of the model, such
    as those of `nn.Sequential`, below the name of the wrapper's field.
    """
    return model.clone(parent=scope, _deep_clone=True)


@contextlib.contextmanager
def on_calls(
    answer: Answer, *, key: int | None = None, scope: Any = None
) -> Iterator[None]:
    """Lets a function answer every layer's call inside a `with` block.

    Methods other than `__call__` are left alone, and so are layers elsewhere.

    Args:
        answer: The function.
        key: What tells the function from others, for programs that `nn.jit` keeps.
        scope: The scope of the network, which may be of a class of `nn.jit` itself. If
            the network stands inside of another, `answer` is told the paths that its
            layers have below it.
    """
    place, above = _Place(key), () if scope is None else scope.path

    def intercept(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        names = context.module.path
        path = "/".join(names[len(above) :])
        with place.at(context.module.scope, "/".join(names)):
            if context.method_name != "__call__" or names[: len(above)] != above:
                return call(*args, **kwargs)
            return answer(context.module, path, call, args, kwargs)

    with place.at(scope, ""), nn.intercept_methods(intercept):
        yield


class _Place:
    """The call that is being made, as a flag of scopes.

    `nn.jit` traces the first call of a class, and keeps the program for every call of
    a module like it. The layers inside are then not called. Modules whose scopes have
    flags of other hashes are not alike: here, each call that a module makes is another.
    """

    def __init__(self, key: int | None) -> None:
        self._key = key
        self._calls: list[tuple[str, Iterator[int]]] = [("", itertools.count())]

    def __hash__(self) -> int:
        path, number = self._calls[-1]
        return hash((self._key, path, next(number)))

    @contextlib.contextmanager
    def at(self, scope: Any, path: str) -> Iterator[None]:
        """Is the place of calls by the module of a path, inside a `with` block."""
        before: Any = None if scope is None else scope.flags
        if scope is not None:
            # Scopes inside of it have its flags.
            scope.flags = flax.core.freeze({**before, f"inertia_jax {self._key}": self})
        self._calls.append((path, itertools.count()))
        try:
            yield
        finally:
            self._calls.pop()
            if scope is not None:
                scope.flags = before


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the input of a layer, whether it is passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
