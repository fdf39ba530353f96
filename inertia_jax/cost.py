"""Parameters and multiply-accumulates of a network, layer by layer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from inertia_jax.inertial_cost import count_inertial
from inertia_jax.inertial_layer import InertialConv
from inertia_jax.ops.conv import pair
from inertia_jax.plan import Plan, Rate, stays_dense

Kind = Literal["conv", "inertial", "dense", "other"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        path: Where the layer stands, e.g. `layer1_0/conv1`.
        kind: `conv`, `inertial`, `dense`, or `other` for layers counted by parameters
            alone.
        output_shape: Of one image, without the batch; empty for `other`.
        params: Number of parameters.
        macs: Multiply-accumulates an image, without bias (FLOPs = 2 x MACs), at the
            gate rate: core evaluations of an inertial layer, closed tiles' included.
        dense_macs: Of the dense convolution that an inertial layer replaces.
        core_macs: Of an inertial layer with every gate closed.
        ladder_macs: Of the capacity that holds the gate rate: what a compiled tiled
            layer multiplies in evaluation, or more where a batch has more open tiles.
        other_ops: Additions, differences, magnitudes and products of friction, box
            means and joins, which are no MACs of a core; two of them count as one MAC.
        gate_rate: Share of open gates that `macs` is counted at.
        note: Why the layer is not what the plan has for it.
    """

    path: str
    kind: Kind
    output_shape: tuple[int, ...]
    params: int
    macs: int
    dense_macs: int | None = None
    core_macs: int | None = None
    ladder_macs: int | None = None
    other_ops: int = 0
    gate_rate: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class CostTable:
    """What a network costs; prints as a table.

    Attributes:
        rows: One a layer that has parameters, in the order of the computation.
    """

    rows: tuple[LayerCost, ...]

    @property
    def params(self) -> int:
        """Number of parameters of the network."""
        return sum(row.params for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates an image, of convolutions and linear layers."""
        return sum(row.macs for row in self.rows)

    @property
    def dense_macs(self) -> int:
        """The same with the dense convolutions that inertial layers replace."""
        return sum(_or(row.dense_macs, row.macs) for row in self.rows)

    @property
    def ladder_macs(self) -> int:
        """What compiled evaluation multiplies, capacities included."""
        return sum(_or(row.ladder_macs, row.macs) for row in self.rows)

    @property
    def other_ops(self) -> int:
        """Operations of friction, box means and joins."""
        return sum(row.other_ops for row in self.rows)

    @property
    def total_macs(self) -> int:
        """Everything counted: `macs`, and `other_ops` at two for one."""
        return self.macs + math.ceil(self.other_ops / 2)

    def __str__(self) -> str:
        if any(row.kind == "inertial" or row.note for row in self.rows):
            return _inertial_table(self)
        header = ("layer", "output", "parameters", "MACs")
        body = [
            (r.path, "x".join(map(str, r.output_shape)), f"{r.params:,}", f"{r.macs:,}")
            for r in self.rows
        ]
        total = ("total", "", f"{self.params:,}", f"{self.macs:,}")
        return _aligned([header, *body, total])


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _inertial_table(table: CostTable) -> str:
    header = (
        "layer",
        "output",
        "parameters",
        "dense MACs",
        "core MACs",
        "gate rate",
        "MACs",
        "as compiled",
        "other ops",
        "",
    )
    lines: list[tuple[str, ...]] = [header]
    for r in table.rows:
        lines.append(
            (
                r.path,
                "x".join(map(str, r.output_shape)),
                f"{r.params:,}",
                f"{_or(r.dense_macs, r.macs):,}",
                "" if r.core_macs is None else f"{r.core_macs:,}",
                "" if r.gate_rate is None else f"{r.gate_rate:.3f}",
                f"{r.macs:,}",
                f"{_or(r.ladder_macs, r.macs):,}",
                f"{r.other_ops:,}" if r.other_ops else "",
                f"  stays dense: {r.note}" if r.note else "",
            )
        )
    lines.append(
        (
            "total",
            "",
            f"{table.params:,}",
            f"{table.dense_macs:,}",
            "",
            "",
            f"{table.macs:,}",
            f"{table.ladder_macs:,}",
            f"{table.other_ops:,}",
            "",
        )
    )
    share = table.total_macs / max(1, table.dense_macs)
    compiled = (table.ladder_macs + table.other_ops / 2) / max(1, table.dense_macs)
    return (
        f"{_aligned(lines)}\n{table.total_macs:,} MACs with two other ops counted as "
        f"one, {share:.3f} of the dense network's; as compiled {compiled:.3f}"
    )


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [f"{{:<{width}}}" for width in widths[:2]]
    row = "  ".join([*left, *(f"{{:>{width}}}" for width in widths[2:])])
    return "\n".join(row.format(*line).rstrip() for line in lines)


def count_cost(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    gate_rates: Mapping[str, float] | None = None,
) -> CostTable:
    """Counts parameters and MACs without running the network.

    A convolution costs `h_out w_out c_out kh kw c_in / groups` MACs an image, a linear
    layer `c_in c_out` a row. Any Linen model whose convolutions are `nn.Conv` or
    `InertialConv` and whose linear layers are `nn.Dense` is counted; parameters count
    whatever holds them.

    Args:
        model: Called as `model(images)`.
        input_shape: Of one image [h, w, c], or of a batch [n, h, w, c]; MACs are those
            of one image either way.
        gate_rates: Share of open gates of inertial layers by path, as evaluation
            measures it; of the others it is the target of `Rate`, or 1.

    Returns:
        The table.

    Raises:
        ValueError: `input_shape` has neither three nor four positive entries, or
            `gate_rates` names no inertial layer or lies outside [0, 1].
    """
    shape = tuple(int(size) for size in input_shape)
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(
            f"`input_shape` (={input_shape}) must be (h, w, c) or (n, h, w, c)."
        )
    calls: dict[str, _Call] = {}

    def record(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ):
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            path = "/".join(context.module.path)
            if isinstance(context.module, (nn.Conv, nn.Dense, InertialConv)):
                calls[path] = _Call(context.module, args[0].shape, output.shape[1:])
            else:
                # Keeps the order of the computation; dropped if it owns nothing.
                calls.setdefault(path, _Call(None, (), ()))
        return output

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, *shape[-3:]), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

    rates = dict(gate_rates or {})
    inertial = {p for p, c in calls.items() if isinstance(c.module, InertialConv)}
    for path, rate in rates.items():
        if path not in inertial:
            raise ValueError(f"`gate_rates` has {path!r}, which is no inertial layer.")
        if not 0 <= rate <= 1:
            raise ValueError(f"`gate_rates` (={rate} for {path!r}) must be in [0, 1].")
    dense = {}
    plan = getattr(model, "plan", None)
    if isinstance(plan, Plan) and plan.rules:
        plain = count_cost(model.clone(plan=Plan()), shape)
        dense = {row.path: row.macs for row in plain.rows}

    owned: dict[str, dict[str, Any]] = {}
    for (*place, name), value in traverse_util.flatten_dict(
        variables["params"]
    ).items():
        owned.setdefault("/".join(place), {})[name] = value
    rows = []
    for path in [*calls, *(path for path in owned if path not in calls)]:
        if path not in owned:
            continue
        call = calls.get(path, _Call(None, (), ()))
        params = sum(math.prod(value.shape) for value in owned[path].values())
        module = call.module
        if isinstance(module, InertialConv):
            target = module.threshold
            default = target.target if isinstance(target, Rate) else 1.0
            rate = rates.get(path, default)
            cost = count_inertial(module, call.input_shape, call.output_shape, rate)
            if path in dense:
                cost["dense_macs"] = dense[path]
            row = LayerCost(
                path, "inertial", call.output_shape, params, gate_rate=rate, **cost
            )
        else:
            kind: Kind = "other"
            macs, note = 0, ""
            if module is not None:
                kind = "conv" if isinstance(module, nn.Conv) else "dense"
                # Each output sums over all but the last axis of the kernel [.., c_out].
                taps = math.prod(owned[path]["kernel"].shape[:-1])
                macs = math.prod(call.output_shape) * taps
            if isinstance(module, nn.Conv) and isinstance(plan, Plan):
                note = _note(plan, path, module)
            row = LayerCost(path, kind, call.output_shape, params, macs, note=note)
        rows.append(row)
    return CostTable(tuple(rows))


@dataclasses.dataclass(frozen=True)
class _Call:
    module: Any
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def _note(plan: Plan, path: str, module: nn.Conv) -> str:
    (side, _), (strides, _) = pair(module.kernel_size), pair(module.strides or 1)
    reason = stays_dense(plan.spec(path), kernel_size=side, strides=strides)
    return reason or ""
