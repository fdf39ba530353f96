"""Answers the calls of a network's layers, so that no model is edited."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
        with on_calls(self.make_answer(train=train)):
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
    given.apply_defaults()
    fields = {name: getattr(model, name, None) for name in MODES}
    said = fields | {n: v for n, v in given.arguments.items() if v is not None}
    return any(
        said[name] == trained
        for name, trained in MODES.items()
        if isinstance(said[name], bool | np.bool_)
    )


def on_scope(model: nn.Module, scope: Any) -> nn.Module:
    """Returns the model in the scope of a module that wraps it, under its own paths.

    `nn.share_scope` would leave the paths of modules that are fields of the model, such
    as those of `nn.Sequential`, below the name of the wrapper's field.
    """
    return model.clone(parent=scope, _deep_clone=True)


def on_calls(answer: Answer) -> contextlib.AbstractContextManager[None]:
    """Lets a function answer every layer's call inside a `with` block.

    Methods other than `__call__` are left alone.
    """

    def intercept(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        return answer(context.module, path, call, args, kwargs)

    return nn.intercept_methods(intercept)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the input of a layer, whether it is passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
