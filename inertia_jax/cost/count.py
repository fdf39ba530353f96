"""Parameters and multiply-accumulates of a network, layer by layer."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from inertia_jax.calls import ApplyFn, Call, init_network, record_calls
from inertia_jax.cost.inertial import count_inertial
from inertia_jax.cost.other import count_other
from inertia_jax.cost.table import CostTable, LayerCost
from inertia_jax.dropped import find_convolutions, find_dropped, find_others
from inertia_jax.inputs import Shape, one_input
from inertia_jax.intercept import Wrapper, on_calls
from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.kinds import (
    CONVOLUTIONS,
    OTHER_CONVOLUTIONS,
    OTHER_LINEAR,
    kind_of,
    num_axes,
    ranks_of,
)
from inertia_jax.plan.plan import Plan, plan_of, without_ladders
from inertia_jax.plan.specs import Fixed, Rate, Threshold


def count_cost(
    model: nn.Module,
    input_shape: Shape,
    *,
    gate_rates: Mapping[str, float] | None = None,
    apply_fn: ApplyFn | None = None,
) -> CostTable:
    """Counts parameters and MACs without running the network.

    A convolution costs `h_out w_out c_out kh kw c_in / groups` MACs an image, a linear
    layer `c_in c_out` a row, a factorised one the sum of its parts. Any Linen model
    whose convolutions are `nn.Conv`, `InertialConv`, `Tucker2Conv` or `LowRankConv` and
    whose linear layers are `nn.Dense` is counted. A layer that is called twice counts
    twice, but once inside `nn.scan`, `nn.remat` and their like, with what its kernels
    hold. Parameters count in every layer, of whatever kind.

    Args:
        model: A network.
        input_shape: Shape of one input: of an image [h, w, c], a sequence [length, c]
            or a volume [depth, h, w, c]; or, by name, of each of several inputs. Where
            the first convolution of the network has not three axes, four entries are
            those of a batch of images [n, h, w, c]; MACs are those of one.
        gate_rates: Share of open gates of inertial layers by path, as evaluation
            measures it (`LAYER/core` where the core is inertial). Layers that are not
            named have the target of their `Rate`, 0 at `Fixed.CLOSED`, and otherwise 1.
        apply_fn: How the network is called, as in `compress`.

    Returns:
        The table.

    Raises:
        ValueError: `input_shape` is not made of positive entries, or `gate_rates` names
            no inertial layer or lies outside [0, 1].

    Example:
        >>> cost = ij.count_cost(model, (28, 28, 1))
        >>> cost.params, cost.macs
        (4802, 58328)
    """
    shape = shape_of_input(model, input_shape, apply_fn)
    return count_one(model, shape, gate_rates=gate_rates, apply_fn=apply_fn)


def shape_of_input(
    model: nn.Module, input_shape: Shape, apply_fn: ApplyFn | None
) -> Shape:
    """Returns the shape of one input, where that of a batch of images may be given.

    Raises:
        ValueError: The shape is not made of positive entries.
    """
    shape = input_shape
    if isinstance(shape, Sequence):
        # A network that has a plan takes images, of two axes.
        takes_images = plan_of(model) is not None and not isinstance(model, Wrapper)
        is_image = len(shape) in (3, 4) or not takes_images
        if not shape or min(shape) < 1 or not is_image:
            raise ValueError(
                f"`input_shape` (={input_shape}) must be (h, w, c) or (n, h, w, c), or "
                f"the shape of another input."
            )
        if len(shape) == 4 and (
            takes_images or not _takes_volumes(model, shape, apply_fn)
        ):
            shape = shape[1:]
    return shape


class _FirstConvolution(Exception):
    """The end of a trace, at the network's first convolution."""


def _takes_volumes(model: nn.Module, shape: Shape, apply_fn: ApplyFn | None) -> bool:
    """Returns whether the first convolution of a network has three axes."""
    found: list[int] = []

    def stop(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        if kind_of(module).spec is not None:
            found.append(num_axes(module))
            raise _FirstConvolution
        return call(*args, **kwargs)

    try:
        with on_calls(stop):
            init = functools.partial(init_network, model, apply_fn=apply_fn)
            jax.eval_shape(init, jax.random.key(0), one_input(shape))
    except Exception:
        # What cannot be traced on volumes takes images, or says itself what is wrong.
        pass
    return found == [3]


def count_one(
    model: nn.Module,
    shape: Shape,
    *,
    gate_rates: Mapping[str, float] | None = None,
    apply_fn: ApplyFn | None = None,
) -> CostTable:
    """Counts as `count_cost` does, for the shape of one input."""
    # Ladders take most of the time to trace and hold the same layers.
    calls, variables = record_calls(without_ladders(model), shape, apply_fn=apply_fn)
    rates = dict(gate_rates or {})
    _check_rates(rates, calls)
    dense, notes = {}, {}
    plan = plan_of(model)
    for path, call in calls.items():
        spec = plan.gates(path) if plan is not None else None
        if spec is not None and isinstance(call.module, InertialConv):
            layer = call.module.clone(capacities=spec.capacities, parent=None)
            calls[path] = dataclasses.replace(call, module=layer)
    if plan is not None and plan.rules:
        plain = count_one(model.clone(plan=Plan()), shape, apply_fn=apply_fn)
        dense = {row.path: row.macs for row in plain.rows}
        dropped = find_dropped(plan, find_convolutions(calls), find_others(calls))
        notes = {rule.path: rule.reason for rule in dropped if rule.path}
    if plan is not None:
        notes |= dict(getattr(model, "kept", ()))
    owned = _leaves_by_layer(calls, variables.get("params", {}))
    rows = []
    for path in [*calls, *(path for path in owned if path not in calls)]:
        if path not in owned:
            continue
        call = calls.get(path, Call(None, (), ()))
        leaves = owned[path]
        params = sum(math.prod(value.shape) for value in leaves.values())
        macs, fields = _count_layer(path, call, calls, leaves, rates)
        kind = kind_of(call.module).name
        if path in dense and kind in CONVOLUTIONS and kind != "conv":
            fields["dense_macs"] = dense[path]
        note = notes.get(path, "")
        out = call.output_shape
        rows.append(LayerCost(path, kind, out, params, macs, note=note, **fields))
    return CostTable(tuple(rows))


def _check_rates(rates: Mapping[str, float], calls: Mapping[str, Call]) -> None:
    """Raises ValueError unless rates are those of inertial layers."""
    for path, rate in rates.items():
        call = calls.get(path)
        if call is None or not isinstance(call.module, InertialConv):
            raise ValueError(f"`gate_rates` has {path!r}, which is no inertial layer.")
        if not 0 <= rate <= 1:
            raise ValueError(f"`gate_rates` (={rate} for {path!r}) must be in [0, 1].")


def _leaves_by_layer(
    calls: Mapping[str, Call], params: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns each layer's parameters; those of its parts are the layer's own."""
    owned: dict[str, dict[str, Any]] = {}
    factorised = [path for path, call in calls.items() if call.is_factorised]
    for keys, value in traverse_util.flatten_dict(params).items():
        place, owner, name = "/".join(keys), "/".join(keys[:-1]), keys[-1]
        for path in factorised:
            if place.startswith(_inside(path)):
                owner, name = path, place.removeprefix(_inside(path))
                break
        owned.setdefault(owner, {})[name] = value
    return owned


def _count_layer(
    path: str,
    call: Call,
    calls: Mapping[str, Call],
    leaves: Mapping[str, Any],
    rates: Mapping[str, float],
) -> tuple[int, dict[str, Any]]:
    """Returns a layer's MACs and the other fields of its row."""
    module = call.module
    if isinstance(module, InertialConv):
        rate = rates.get(path, _expected_rate(module.threshold))
        cost: collections.Counter[str] = collections.Counter()
        for one in call.every:
            cost.update(count_inertial(module, one.input_shape, one.output_shape, rate))
        return cost.pop("macs"), {"gate_rate": rate, **cost}
    if isinstance(module, (nn.Conv, nn.Dense)):
        return _outputs(call) * _taps(leaves["kernel"]), {}
    if isinstance(module, (*OTHER_CONVOLUTIONS, *OTHER_LINEAR)):
        return count_other(call, leaves["kernel"].shape), {}
    if not call.is_factorised:
        return 0, {}
    fields: dict[str, Any] = {"ranks": ranks_of(module)}
    macs = macs_of_core = 0
    for name in kind_of(module).parts:
        place = f"{_inside(path)}{name}"
        part = calls.get(place)
        if part is None:
            continue
        if isinstance(part.module, InertialConv):
            macs_of_core, fields_of_core = _count_layer(place, part, calls, {}, rates)
            del fields_of_core["dense_macs"]
            fields |= fields_of_core
        else:
            macs += _outputs(part) * _taps(leaves[f"{name}/kernel"])
    # The factors are computed whatever the gates do.
    for key in fields.keys() & {"core_macs", "ladder_macs"}:
        fields[key] += macs
    return macs + macs_of_core, fields


def _inside(path: str) -> str:
    """Returns the beginning of paths inside a layer; it is empty for the network."""
    return f"{path}/" if path else ""


def _expected_rate(threshold: Threshold) -> float:
    if isinstance(threshold, Rate):
        return threshold.target
    return 0.0 if isinstance(threshold, Fixed) and threshold.is_closing else 1.0


def _outputs(call: Call) -> int:
    """Returns the number of outputs of all calls of a layer."""
    return sum(math.prod(one.output_shape) for one in call.every)


def _taps(kernel: Any) -> int:
    """Returns the number of terms of each output, for a kernel [.., c_out]."""
    return math.prod(kernel.shape[:-1])
