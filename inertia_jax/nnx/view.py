"""An NNX module read as a Linen model: the same layers, under the same paths."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core import Scope

from inertia_jax.intercept import MODES
from inertia_jax.nnx.equals import (
    PLANNED,
    Layer,
    find_layers,
    linen_layer,
    opaque_layer,
)
from inertia_jax.nnx.graph import Path
from inertia_jax.nnx.variables import iter_variables, put_at, value_at

# The attribute by which a layer knows its place in Linen.
_PLACE = "_inertia_jax_place"
_INSIDE = "is called inside nnx.jit, nnx.remat, nnx.scan or nnx.vmap"


class Source:
    """A module as it is when it is read.

    Attributes:
        module: A copy of the module, which nothing changes.
        layers: The layers that Linen has, too, by path.
    """

    def __init__(self, module: nnx.Module) -> None:
        """Copies the module; arrays are shared."""
        self.module = nnx.clone(module, graph=True)
        self.layers = find_layers(self.module)

    def variables(self) -> dict[str, Any]:
        """Returns the module's variables, as Linen has them."""
        variables: dict[str, Any] = {}
        for place, variable in iter_variables(self.module, self.layers):
            put_at(variables, place, variable.get_raw_value())
        return variables


class LinenView(nn.Module):
    """An NNX module as a Linen model.

    Every call makes the module anew from the variables, and puts back what the module
    has changed in them. A convolution, linear layer or BatchNorm of Flax calls Linen's
    equal of it, which can be seen and intercepted as those of any Linen model.

    Attributes:
        source: The module.
    """

    source: Source

    def __call__(
        self, images: Any, *args: Any, train: bool = False, **kwargs: Any
    ) -> Any:
        def call(module: Any) -> Any:
            taken = inspect.signature(type(module).__call__).parameters
            modes = {n: train == value for n, value in MODES.items() if n in taken}
            return module(images, *args, **modes | kwargs)

        return self.run(call, train=train)

    @nn.nowrap
    def run(self, call: Callable[[Any], Any], *, train: bool) -> Any:
        """Calls a function of the NNX module with these variables.

        Args:
            call: The function.
            train: Whether the module is in training mode.
        """
        module = nnx.clone(self.source.module, graph=True)
        layers = self.source.layers
        given = []
        for place, variable in iter_variables(module, layers):
            # In a layer that a plan replaces there are others than the module's own.
            value, own = value_at(self.variables, place), variable.get_raw_value()
            if value is None and self.is_initializing():
                value = own
            variable.set_raw_value(value)
            given.append((place, variable, value))
        places = {path: _Place(layer, self.scope) for path, layer in layers.items()}
        for path, layer in find_layers(module).items():
            places[path].take(layer.node)
        (module.train if train else module.eval)()
        output = call(module)
        for place, variable, before in given:
            self._put(place, before, variable.get_raw_value(), places)
        return output

    @nn.nowrap
    def _put(
        self, place: Path, before: Any, after: Any, places: "dict[Path, _Place]"
    ) -> None:
        """Puts a variable that was changed, or is the first, into the scope."""
        is_first = self.is_initializing() and not any(
            places[place[1:n]].is_called
            for n in range(1, len(place))
            if place[1:n] in places
        )
        if (is_first or after is not before) and self.is_mutable_collection(place[0]):
            scope = _scope_at(self.scope, place[1:-1])
            scope.put_variable(place[0], place[-1], after)


class _Place:
    """The place in Linen of a layer, whose calls it answers.

    Attributes:
        is_called: Whether Linen's equal has been called, on variables of its own.
    """

    def __init__(self, layer: Layer, root: Any) -> None:
        self.is_called = False
        self._layer, self._root = layer, root
        self._node: Any = None
        self._stored: list[tuple[nnx.Variable[Any], Any]] = []

    def take(self, node: nnx.Module) -> None:
        """Lets a layer's calls be answered from now on."""
        self._node = node
        variables = [leaf for _, leaf in iter_variables(node)]
        self._stored = [(leaf, leaf.get_raw_value()) for leaf in variables]
        vars(node)[_PLACE] = self
        node.__class__ = _answered(type(node))

    def answer(self, node: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """Returns a layer's output.

        Args:
            node: The layer.
            call: Its own call.
            args: The call's arguments.
            kwargs: The call's arguments by name.
        """
        path, why = self._layer.path, self._layer.reason
        is_inside = node is not self._node
        if is_inside and not isinstance(node, PLANNED):
            why = why or _INSIDE
        if not all(leaf.get_raw_value() is value for leaf, value in self._stored):
            why = why or "is called with parameters that differ from those stored"
        given = dict(inspect.signature(call).bind(*args, **kwargs).arguments)
        if given.pop("out_sharding", None) is not None:
            why = why or "is called with out_sharding"
        scope = self._own_scope(node) if is_inside else _scope_at(self._root, path)
        if why is None:
            self._check_channels(node, next(iter(given.values())))
            self.is_called = True
            return linen_layer(node, scope, given)(**given)
        opaque = opaque_layer(node, scope, call, why)
        return (call if opaque is None else opaque)(*args, **kwargs)

    def _check_channels(self, node: Any, x: Any) -> None:
        """Raises ValueError unless an input has the channels of a layer's kernel.

        Linen's layers make their kernels for the inputs that there are.
        """
        channels = getattr(node, "in_features", x.shape[-1])
        if x.shape[-1] != channels:
            raise ValueError(
                f"{'/'.join(self._layer.path)!r} is called on an array of shape "
                f"{x.shape}; must have {channels} channels."
            )

    def _own_scope(self, node: nnx.Module) -> Any:
        """Returns a scope of the variables that a layer has inside a transformation."""
        path = self._layer.path
        variables: dict[str, Any] = {}
        for (collection, *below), variable in iter_variables(node, [()]):
            put_at(variables, (collection, *path, *below), variable.get_raw_value())
        return _scope_at(Scope(variables, mutable=False), path)


@functools.cache
def _answered(cls: type[nnx.Module]) -> type[nnx.Module]:
    """Returns a class of layers whose calls are answered by their places."""

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(cls.__call__, self)
        return getattr(self, _PLACE).answer(self, call, args, kwargs)

    same = {"__module__": cls.__module__, "__call__": __call__}
    options = {"pytree": cls._pytree__is_pytree}
    return types.new_class(
        cls.__name__, (cls,), options, lambda body: body.update(same)
    )


def _scope_at(scope: Any, path: Path) -> Any:
    """Returns the scope of a layer, as if nothing had been called there."""
    for name in path:
        scope = scope.push(name, reuse=True)
    return scope.rewound()
