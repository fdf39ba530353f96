"""An NNX module read as a Linen model: the same layers, under the same paths."""

import inspect
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx

from inertia_jax.intercept import MODES
from inertia_jax.nnx.answers import BridgePlace, LayerPlace
from inertia_jax.nnx.bridges import find_bridges
from inertia_jax.nnx.equals import find_layers
from inertia_jax.nnx.graph import Path
from inertia_jax.nnx.places import Place, leaves_below, scope_at
from inertia_jax.nnx.variables import iter_variables, put_at, value_at


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
    equal of it, which can be seen and intercepted as those of any Linen model, and so
    can the layers of Linen models inside of `nnx.bridge.ToNNX`.

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
        given = []
        for place, variable in iter_variables(module, self.source.layers):
            # In a layer that a plan replaces there are others than the module's own.
            value, own = value_at(self.variables, place), variable.get_raw_value()
            if value is None and self.is_initializing():
                value = own
            variable.set_raw_value(value)
            given.append((place, variable, value))
        places = self._places(module)
        own_places = {place for place, *_ in given}
        for path, at in places.items():
            for place, value in leaves_below(self.variables, path):
                if place not in own_places:
                    given.append((place, at.hold(place, value), value))
        (module.train if train else module.eval)()
        output = call(module)
        known = {id(variable) for _, variable, _ in given}
        for at in places.values():
            given += [(p, v, None) for p, v in at.leave() if id(v) not in known]
        for place, variable, before in given:
            self._put(place, before, variable.get_raw_value(), places)
        return output

    @nn.nowrap
    def _places(self, module: nnx.Module) -> dict[Path, Place]:
        """Lets Linen answer the calls of a module's layers; returns their places."""
        places: dict[Path, Place] = {}
        # Before any of them has another class.
        bridges, layers = find_bridges(module), find_layers(module)
        for path, layer in self.source.layers.items():
            places[path] = LayerPlace(layer, self.scope)
            places[path].take(layers[path].node)
        for path, bridge in bridges.items():
            places[path] = BridgePlace(path, self.scope)
            places[path].take(bridge)
        return places

    @nn.nowrap
    def _put(
        self, place: Path, before: Any, after: Any, places: dict[Path, Place]
    ) -> None:
        """Puts a variable that was changed, or is the first, into the scope."""
        is_first = self.is_initializing() and not any(
            places[place[1:n]].makes(place)
            for n in range(1, len(place))
            if place[1:n] in places
        )
        if (is_first or after is not before) and self.is_mutable_collection(place[0]):
            scope = scope_at(self.scope, place[1:-1])
            scope.put_variable(place[0], place[-1], after)
