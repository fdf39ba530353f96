"""The layers of a network that PyTorch has, each one operation of its trace."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Primitive

from inertia_jax.intercept import first_argument, on_calls
from inertia_jax.layers.in_place import own_arithmetic
from inertia_jax.layers.kinds import kind_of
from inertia_jax.layers.pointwise import Pointwise
from inertia_jax.ops.conv.conv import explicit_padding, pair, stride_pair
from inertia_jax.weights.layout import torch_key, transposed

# An image as Flax and as PyTorch order its axes.
IMAGE_ORDER = (0, 3, 1, 2)

layer_p = Primitive("torch_layer")


@layer_p.def_abstract_eval
def _(x: Any, *, layer: "TorchLayer", like: Any) -> Any:
    return like


@dataclasses.dataclass(frozen=True, eq=False)
class TorchLayer:
    """A layer of PyTorch.

    Attributes:
        name: Its name in the network, e.g. `layer1.0.conv1`.
        constructor: The code that makes it, e.g. `nn.Linear(64, 10)`.
        order: The axis of Flax's array that each axis of PyTorch's tensor is, for both
            input and output.
        state: Its part of the state dict.
        pads: Zeros that are to be put around its input, as `functional.pad` takes them.
        parts: The layers of which it is an `nn.Sequential`.
    """

    name: str
    constructor: str
    order: tuple[int, ...]
    state: Mapping[str, np.ndarray]
    pads: tuple[int, ...] = ()
    parts: tuple["TorchLayer", ...] = ()


def trace_network(
    function: Callable[[Any, Any], Any], variables: Any, images: jax.ShapeDtypeStruct
) -> ClosedJaxpr:
    """Returns the program of a network, in which every layer of PyTorch is one call.

    What such a layer computes by itself is in the program, too, and not used.

    Args:
        function: The network, a function of variables and images.
        variables: Its variables.
        images: The shape of the images, whose number may be a symbol.
    """
    made: dict[tuple[str, ...], TorchLayer] = {}
    calls: collections.Counter[tuple[str, ...]] = collections.Counter()

    def answer(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        calls[module.path] += 1
        number = calls[module.path]
        output = call(*args, **kwargs)
        # What takes this layer's place, such as an inertial layer, is called inside,
        # under the same path.
        if calls[module.path] > number:
            return output
        x = first_argument(args, kwargs)
        layer = _sequence(module, made) or _make_layer(module, x, variables)
        if layer is not None:
            output = layer_p.bind(x, layer=layer, like=jax.typeof(output))
            made[module.path] = layer
        return output

    with on_calls(answer):
        return jax.make_jaxpr(function)(variables, images)


def _sequence(module: Any, made: Mapping[Any, TorchLayer]) -> TorchLayer | None:
    """Returns a factorised convolution whose parts are all layers of PyTorch."""
    names = kind_of(module).parts
    parts = [made.get((*module.path, name)) for name in names]
    layers = [part for part in parts if part is not None]
    if not names or len(layers) < len(names) or any(layer.pads for layer in layers):
        return None
    state = {key: value for layer in layers for key, value in layer.state.items()}
    name = torch_key((*module.path, "bias")).removesuffix(".bias")
    return TorchLayer(name, "", layers[0].order, state, parts=tuple(layers))


def _make_layer(module: Any, x: Any, variables: Any) -> TorchLayer | None:
    """Returns a layer of PyTorch, or None if it has none that computes the same."""
    named: dict[str, Any] = {}
    for collection in ("params", "batch_stats"):
        leaves = variables.get(collection, {})
        for name in module.path:
            leaves = leaves.get(name, {}) if isinstance(leaves, Mapping) else {}
        named |= dict(leaves)
    told = None
    if type(module) in (nn.Conv, Pointwise, nn.Dense) and "kernel" in named:
        told = _as_product(module, x, named["kernel"].shape)
    elif type(module) is nn.BatchNorm and {"mean", "var", "scale", "bias"} <= {*named}:
        told = _as_batch_norm(module, x, len(named["mean"]))
    if told is None:
        return None
    constructor, order, pads = told
    state = {
        torch_key((*module.path, leaf)): transposed(
            np.asarray(value), to_torch_layout=True
        )
        for leaf, value in named.items()
    }
    name = torch_key((*module.path, "bias")).removesuffix(".bias")
    return TorchLayer(name, constructor, order, state, pads)


_Told = tuple[str, tuple[int, ...], tuple[int, ...]]


def _as_product(module: Any, x: Any, shape: tuple[int, ...]) -> _Told | None:
    """Returns constructor, order and pads of a convolution or linear layer."""
    bias = "" if module.use_bias else ", bias=False"
    groups = getattr(module, "feature_group_count", 1)
    if own_arithmetic(module):
        return None
    if len(shape) == 2:
        words = f"{shape[0]}, {shape[1]}{bias}"
        return f"nn.Linear({words})", tuple(range(x.ndim)), ()
    if len(shape) != 4 or x.ndim != 4:
        return None
    words = f"{groups * shape[2]}, {shape[3]}, {_one_or_two(shape[:2])}"
    pads: tuple[int, ...] = ()
    if type(module) is nn.Conv:
        name = module.padding if isinstance(module.padding, str) else ""
        if name.upper() in ("CIRCULAR", "REFLECT", "CAUSAL") or module.mask is not None:
            return None
        if pair(module.input_dilation or 1) != (1, 1):
            return None
        strides = stride_pair(module.strides)
        taps = pair(module.kernel_dilation or 1)
        around = explicit_padding(
            x.shape[1:3], shape[:2], strides, module.padding, taps
        )
        (top, bottom), (left, right) = around
        if strides != (1, 1):
            words += f", stride={_one_or_two(strides)}"
        if (top, left) != (bottom, right) or min(top, left) < 0:
            pads = (left, right, top, bottom)
        elif (top, left) != (0, 0):
            words += f", padding={_one_or_two((top, left))}"
        if taps != (1, 1):
            words += f", dilation={_one_or_two(taps)}"
    words += "" if groups == 1 else f", groups={groups}"
    return f"nn.Conv2d({words}{bias})", IMAGE_ORDER, pads


def _as_batch_norm(module: Any, x: Any, channels: int) -> _Told | None:
    axis = module.axis if isinstance(module.axis, int) else None
    if axis not in (-1, x.ndim - 1) or x.ndim not in (2, 4):
        return None
    if own_arithmetic(module) or not (module.use_scale and module.use_bias):
        return None
    momentum = round(1 - module.momentum, 12)
    words = f"{channels}, eps={module.epsilon!r}, momentum={momentum!r}"
    if x.ndim == 2:
        return f"nn.BatchNorm1d({words})", (0, 1), ()
    return f"nn.BatchNorm2d({words})", IMAGE_ORDER, ()


def _one_or_two(sizes: Any) -> str:
    first, second = (int(size) for size in sizes)
    return str(first) if first == second else f"({first}, {second})"
