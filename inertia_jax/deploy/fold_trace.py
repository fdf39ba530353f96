"""Finds the layer that each BatchNorm directly follows, from a network's trace."""

import collections
import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from inertia_jax.calls import ApplyFn, init_network
from inertia_jax.inputs import Shape, one_input
from inertia_jax.intercept import on_calls
from inertia_jax.layers.batch_norm import BatchNormToTrain
from inertia_jax.layers.kinds import KINDS
from inertia_jax.programs import every_program
from inertia_jax.variables import without_boxes

_MARK = "inertia_jax.deploy.fold"


@dataclasses.dataclass(frozen=True)
class NormTrace:
    """A network's layers and its BatchNorm, and which follows which.

    Attributes:
        layers: The layers of a kind in `KINDS`, by path.
        norms: The BatchNorm layers, by path.
        layer_before: The path of the layer before a BatchNorm, by the BatchNorm's path.
            Both are called once, and nothing else uses the layer's output.
        by_batch: The paths of the BatchNorm layers that use the statistics of a batch.
        variables: The shapes of the network's variables.
    """

    layers: dict[str, Any]
    norms: dict[str, nn.BatchNorm]
    layer_before: dict[str, str]
    by_batch: set[str]
    variables: dict[str, Any]


def trace_layers(
    model: nn.Module, image_shape: Shape, apply_fn: ApplyFn | None
) -> NormTrace:
    """Returns which BatchNorm is called on the output of which layer.

    Outputs of layers and inputs of BatchNorm are given names in the trace, which shows
    every use of an array. Nothing is computed.
    """
    layers: dict[str, Any] = {}
    norms: dict[str, nn.BatchNorm] = {}
    outputs: dict[str, Any] = {}
    by_batch: set[str] = set()

    def mark(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        if type(module) is nn.BatchNorm:
            if not uses_running_average(module, args, kwargs):
                by_batch.add(path)
            x, *rest = args or (kwargs.pop("x"),)
            axis = -1 if module.axis == x.ndim - 1 else module.axis
            norms[path] = module.copy(parent=None, axis=axis)
            return call(checkpoint_name(x, f"{_MARK}:norm:{path}"), *rest, **kwargs)
        output = call(*args, **kwargs)
        # A replacement layer is called, and marked, inside the replaced one, under the
        # same path.
        if type(module) not in KINDS or outputs.get(path) is output:
            return output
        layers[path] = module.copy(parent=None)
        outputs[path] = checkpoint_name(output, f"{_MARK}:layer:{path}")
        return outputs[path]

    images = one_input(image_shape)
    with on_calls(mark):
        init = functools.partial(init_network, model, apply_fn=apply_fn)
        traced = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0), images)
    jaxpr, variables = traced[0].jaxpr, without_boxes(traced[1])
    follows: dict[str, str] = {}
    calls: collections.Counter[str] = collections.Counter()
    for inner in every_program(jaxpr):
        uses = collections.Counter(id(v) for eqn in inner.eqns for v in eqn.invars)
        uses.update(id(v) for v in inner.outvars)
        made_by: dict[int, str] = {}
        for eqn in inner.eqns:
            mark_of, kind, path = _read_mark(eqn)
            if mark_of != _MARK:
                continue
            calls[path] += 1
            if kind == "layer":
                made_by[id(eqn.outvars[0])] = path
            elif uses[id(eqn.invars[0])] == 1 and id(eqn.invars[0]) in made_by:
                follows[path] = made_by[id(eqn.invars[0])]
    layer_before = {
        norm: layer
        for norm, layer in follows.items()
        if calls[norm] == calls[layer] == 1
    }
    return NormTrace(layers, norms, layer_before, by_batch, variables)


def uses_running_average(module: Any, args: Any, kwargs: Any) -> bool:
    """Returns whether a call of BatchNorm normalises by running statistics."""
    if isinstance(module, BatchNormToTrain):
        return False
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(module.use_running_average if given is None else given)


def _read_mark(eqn: Any) -> tuple[str, str, str]:
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    mark, _, rest = str(name).partition(":")
    kind, _, path = rest.partition(":")
    return mark, kind, path
