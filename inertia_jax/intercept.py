"""Answers the calls of a network's layers, so that no model is edited."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn

# A function of (module, path, call, args, kwargs) that returns a layer's output:
# `call(*args, **kwargs)`, or what takes its place.
Answer = Callable[[Any, str, Callable[..., Any], Any, Any], Any]


class Wrapper(nn.Module):
    """A module that stands around a network, and is called as the network is."""

    @property
    def wrapped(self) -> nn.Module:
        """The network."""
        raise NotImplementedError

    @nn.nowrap
    def make_answer(self) -> Answer:
        """Returns what answers the calls of the network's layers."""
        raise NotImplementedError

    @nn.nowrap
    @contextlib.contextmanager
    def inside(self) -> Iterator[nn.Module]:
        """Gives the network, whose layers are answered inside the `with` block.

        The wrapper must be bound to variables, and so is the network. Methods of the
        network other than `__call__` are called in this way.
        """
        with on_calls(self.make_answer()):
            yield on_scope(self.wrapped, self.scope)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.inside() as network:
            return network(*args, **kwargs)


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


def check_in_view(module: nn.Module, roots: list[Any], *, is_wanted: bool) -> None:
    """Checks that a layer's inputs are still there when the network has been called.

    Whoever records inputs checks every module that is called, the network first, with
    the same list of `roots`, empty at first. Modules that are not wanted are not
    checked.

    Raises:
        ValueError: The layer is inside a lifted transformation.
    """
    root = None if module.scope is None else module.scope.root
    if not roots:
        roots.append(root)
    if is_wanted and root is not roots[0]:
        path = "/".join(module.path)
        raise ValueError(
            f"{path!r} is called inside nn.scan, nn.remat, nn.vmap or nn.jit, where "
            f"its inputs cannot be seen; leave it out with `layers`."
        )


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the input of a layer, whether it is passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
