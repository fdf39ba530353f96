"""The time of a network and of its layers on a chip, as its compiler estimates it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from inertia_jax.calls import ApplyFn, Network, apply_network
from inertia_jax.chips.cache import cached_cycles
from inertia_jax.chips.chip import find_chip
from inertia_jax.chips.compiler import lower_for
from inertia_jax.chips.estimate import mark
from inertia_jax.inputs import Shape, one_input
from inertia_jax.intercept import Wrapper, on_calls
from inertia_jax.layers.kinds import kind_of
from inertia_jax.variables import plain_variables


class ChipTimes(NamedTuple):
    """The time of a network's evaluation on a chip, in milliseconds per call.

    Attributes:
        ms: The time of the network.
        layers: The part of each convolution and linear layer, by path, with what the
            compiler has joined to it.
    """

    ms: float
    layers: dict[str, float]


def chip_times(
    network: Network,
    image_shape: Shape,
    *,
    device: str,
    batch_size: int,
    apply_fn: ApplyFn | None = None,
) -> ChipTimes:
    """Returns what a chip's compiler estimates of a network, in bfloat16.

    The layers are those of the whole network: by itself, a layer would have to read and
    write the main memory, and could not be joined to others, so that the forms of one
    layer would compare otherwise.

    Args:
        network: The network. Of its variables only shapes and types count.
        image_shape: The shape of one input.
        device: The chip.
        batch_size: Images per call.
        apply_fn: How the network is called, as in `compress`.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: The network does not fit into the memory of the chip.
    """
    model, variables = network
    model = _as_bfloat16(model)

    paths: dict[str, None] = {}

    def marked(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        if kind_of(module).name == "other":
            return call(*args, **kwargs)
        paths[path] = None
        with mark(path):
            return call(*args, **kwargs)

    def forward(variables: Any, images: Any) -> Any:
        with on_calls(marked):
            return apply_network(model, variables, images, apply_fn=apply_fn)[0]

    shapes = plain_variables(variables), one_input(image_shape, number=batch_size)
    lowered = lower_for(forward, *jax.tree.map(_in_bfloat16, shapes), chip=device)
    cycles, layers = cached_cycles(lowered, chip=device, marks=paths)
    ms = 1e3 / find_chip(device).clock_hz
    return ChipTimes(cycles * ms, {path: part * ms for path, part in layers.items()})


def _as_bfloat16(model: nn.Module) -> nn.Module:
    """Returns a network that computes in bfloat16, if a field of it says in what."""
    fields = {field.name for field in dataclasses.fields(model)}
    if isinstance(model, Wrapper):
        inner = model.wrapped
        name = next(name for name in fields if getattr(model, name) is inner)
        changes: dict[str, Any] = {name: _as_bfloat16(inner)}
        return model.clone(**changes)
    return model.clone(dtype=jnp.bfloat16) if "dtype" in fields else model


def _in_bfloat16(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array, and its type, which is bfloat16 for any float."""
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if is_float else leaf.dtype)
