"""What Linen answers to the calls of a layer, and of a Linen model inside a module."""

import inspect
from typing import Any

import jax
from flax import nnx
from flax.core.scope import LazyRng

from inertia_jax.intercept import on_scope
from inertia_jax.nnx.bridges import OWN, unplanned
from inertia_jax.nnx.equals import Layer, linen_layer, opaque_layer
from inertia_jax.nnx.graph import Path
from inertia_jax.nnx.places import Place


class LayerPlace(Place):
    """The place of a layer that Linen has, too."""

    def __init__(self, layer: Layer, root: Any) -> None:
        """Makes the place of a layer below a scope, the root."""
        super().__init__(layer.path, root)
        self._reason = layer.reason

    def answer(self, node: Any, call: Any, args: Any, kwargs: Any) -> Any:
        why = self._reason
        given = dict(inspect.signature(call).bind(*args, **kwargs).arguments)
        if given.pop("out_sharding", None) is not None:
            why = why or "is called with out_sharding"
        x = next(iter(given.values()))
        if why is not None:
            opaque = opaque_layer(node, self._scope(node, x), call, why)
            return (call if opaque is None else opaque)(*args, **kwargs)
        self._check_channels(node, x)
        return self._answered(node, x, given)

    def _call(self, node: Any, scope: Any, inputs: Any) -> Any:
        return linen_layer(node, scope, inputs)(**inputs)

    def _check_channels(self, node: Any, x: Any) -> None:
        """Raises ValueError unless an input has the channels of a layer's kernel.

        Linen's layers make their kernels for the inputs that there are.
        """
        channels = getattr(node, "in_features", x.shape[-1])
        if x.shape[-1] != channels:
            raise ValueError(
                f"{'/'.join(self._path)!r} is called on an array of shape "
                f"{x.shape}; must have {channels} channels."
            )


class BridgePlace(Place):
    """The place of a Linen model inside of `nnx.bridge.ToNNX`."""

    def answer(self, node: Any, call: Any, args: Any, kwargs: Any) -> Any:
        x = next(iter(jax.tree.leaves((args, kwargs))), None)
        return self._answered(node, x, (args, kwargs))

    def _call(self, node: Any, scope: Any, inputs: Any) -> Any:
        args, kwargs = inputs[0], dict(inputs[1])
        # What may change is said by the scope.
        kwargs.pop("mutable", None)
        method, rngs = kwargs.pop("method", None), kwargs.pop("rngs", None)
        keys = _keys(node.to_nnx__rngs if rngs is None else rngs)
        scope.rngs = {name: LazyRng.create(key) for name, key in keys.items()}
        scope.rng_counters = dict.fromkeys(keys, 0)
        model = on_scope(unplanned(node.to_nnx__module), scope)
        if method is None or isinstance(method, str):
            return getattr(model, method or "__call__")(*args, **kwargs)
        return method(model, *args, **kwargs)

    def makes(self, place: Path) -> bool:
        # Linen knows nothing of the bridge's own variables, its streams of keys.
        name = place[1 + len(self._path)]
        return super().makes(place) and not name.startswith(OWN)


def _keys(rngs: Any) -> dict[str, jax.Array]:
    """Returns the keys that `nnx.bridge.ToNNX` draws for a call of a Linen model."""
    if rngs is None:
        return {}
    if not isinstance(rngs, nnx.Rngs):
        return {"params": rngs}
    keys = {name: stream() for name, stream in rngs.items()}
    if "params" not in keys and "default" in keys:
        keys["params"] = keys.pop("default")
    return keys
