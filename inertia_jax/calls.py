"""How every layer of a network is called: its module, and the shapes it sees."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from inertia_jax.layers.kinds import KINDS, kind_of
from inertia_jax.layers.pointwise import Pointwise

# A model and its variables.
Network = tuple[nn.Module, Mapping[str, Any]]

_COUNTED: tuple[type[nn.Module], ...] = (Pointwise, *KINDS)


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables as dictionaries of arrays.

    Mappings of any class become dictionaries, such as `FrozenDict`. Boxes are opened,
    such as the `nn.Partitioned` of `nn.with_partitioning`. The arrays stay themselves.
    """

    def plain(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {name: plain(child) for name, child in node.items()}

    return dict(meta.unbox(plain(variables)))


class Wrapper(nn.Module):
    """A module that stands around a network, and is called as the network is."""

    @property
    def wrapped(self) -> nn.Module:
        """The network."""
        raise NotImplementedError


def on_scope(model: nn.Module, scope: Any) -> nn.Module:
    """Returns the model in the scope of a module that wraps it, under its own paths.

    `nn.share_scope` would leave the paths of modules that are fields of the model, such
    as those of `nn.Sequential`, below the name of the wrapper's field.
    """
    return model.clone(parent=scope, _deep_clone=True)


def on_calls(
    answer: Callable[[Any, str, Callable[..., Any], Any, Any], Any],
) -> contextlib.AbstractContextManager[None]:
    """Lets a function answer every layer's call inside a `with` block.

    Args:
        answer: A function of (module, path, call, args, kwargs) that returns the
            output: `call(*args, **kwargs)`, or what takes its place. Methods other than
            `__call__` are left alone.
    """

    def intercept(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        return answer(context.module, path, call, args, kwargs)

    return nn.intercept_methods(intercept)


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer is called.

    Attributes:
        module: The layer; None for one whose operations are not counted.
        input_shape: The input's shape, [n, h, w, c_in].
        output_shape: The output's shape, of one image.
        again: Further calls of the same layer.
    """

    module: Any
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    again: tuple["Call", ...] = ()

    @property
    def every(self) -> tuple["Call", ...]:
        """All calls of the layer."""
        return (self, *self.again)

    @property
    def is_factorised(self) -> bool:
        """Whether the layer's parts are layers themselves."""
        return bool(kind_of(self.module).parts)


def record_calls(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[dict[str, Call], Any]:
    """Returns how every layer is called, by path, and the shapes of all variables.

    Nothing is computed.

    Args:
        model: A network, called as `model(images)`, with `train=False` where it takes
            `train`.
        shape: Shape of one image [h, w, c], or of a batch.
    """
    calls: dict[str, Call] = {}
    # Inside `nn.scan` and its like, a layer is traced anew, below a scope of its own.
    roots: dict[str, Any] = {}

    def record(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        before = calls.get(path)
        output = call(*args, **kwargs)
        known = calls.get(path)
        if not isinstance(module, _COUNTED):
            # The entry keeps the order of the computation.
            calls.setdefault(path, Call(None, (), ()))
        elif known is before:  # no replacement of the layer was recorded inside it
            x = first_argument(args, kwargs)
            found = Call(module, x.shape, output.shape[1:])
            root = None if module.scope is None else module.scope.root
            if roots.setdefault(path, root) is not root:
                return output
            if known is not None and known.module is not None:
                found = dataclasses.replace(known, again=(*known.again, found))
            calls[path] = found
        return output

    with on_calls(record):
        images = jax.ShapeDtypeStruct((1, *shape[-3:]), jnp.float32)
        init = functools.partial(model.init, **evaluating(model))
        variables = jax.eval_shape(init, jax.random.key(0), images)
    return calls, variables


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


def takes_train(model: nn.Module) -> bool:
    """Returns whether a network, or what a module wraps, is called with `train`."""
    while isinstance(model, Wrapper):
        model = model.wrapped
    return "train" in inspect.signature(type(model).__call__).parameters


def evaluating(model: nn.Module) -> dict[str, Any]:
    """Returns the keyword arguments that a network is evaluated with."""
    return {"train": False} if takes_train(model) else {}


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the input of a layer, whether it is passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
