"""Parameters and multiply-accumulates of a network, layer by layer."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from inertia_jax.factorised import LowRankConv, Pointwise, Tucker2Conv
from inertia_jax.inertial_cost import count_inertial
from inertia_jax.inertial_layer import InertialConv
from inertia_jax.plan import Plan, Rate, stays_dense

Kind = Literal["conv", "inertial", "tucker2", "low_rank", "dense", "other"]
CONVOLUTIONS = ("conv", "inertial", "tucker2", "low_rank")


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        path: Where the layer stands, e.g. `layer1_0/conv1`.
        kind: `conv`, `inertial`, `tucker2`, `low_rank`, `dense`, or `other` for layers
            counted by parameters alone.
        output_shape: Of one image, without the batch; empty for `other`.
        params: Number of parameters.
        macs: Multiply-accumulates an image, without bias (FLOPs = 2 x MACs), at the
            gate rate: core evaluations of an inertial layer, closed tiles' included.
        dense_macs: Of the dense convolution that the layer replaces.
        core_macs: Of an inertial layer with every gate closed.
        ladder_macs: Of the capacity that holds the gate rate: what a compiled tiled
            layer multiplies in evaluation, or more where a batch has more open tiles.
        other_ops: Additions, differences, magnitudes and products of friction, box
            means and joins, which are no MACs of a core; two of them count as one MAC.
        gate_rate: Share of open gates that `macs` is counted at.
        ranks: (rank_in, rank_out) of a Tucker-2 layer, (rank,) of two factors.
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
    ranks: tuple[int, ...] = ()
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
        """The same with the dense convolutions that other kinds replace."""
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
        gated = any(row.gate_rate is not None for row in self.rows)
        ranked = any(row.ranks for row in self.rows)
        noted = any(row.note for row in self.rows)
        columns: dict[str, Callable[[LayerCost], str]] = {
            "layer": lambda r: r.path,
            "output": lambda r: "x".join(map(str, r.output_shape)),
        }
        if ranked:
            columns["ranks"] = lambda r: ",".join(map(str, r.ranks))
        columns["parameters"] = lambda r: f"{r.params:,}"
        if gated or ranked:
            columns["dense MACs"] = lambda r: f"{_or(r.dense_macs, r.macs):,}"
        if gated:
            columns["core MACs"] = lambda r: _number(r.core_macs)
            columns["gate rate"] = lambda r: (
                "" if r.gate_rate is None else f"{r.gate_rate:.3f}"
            )
        columns["MACs"] = lambda r: f"{r.macs:,}"
        if gated:
            columns["as compiled"] = lambda r: f"{_or(r.ladder_macs, r.macs):,}"
            columns["other ops"] = lambda r: _number(r.other_ops or None)
        if noted:
            columns[""] = lambda r: f"  stays dense: {r.note}" if r.note else ""
        totals = {
            "layer": "total",
            "parameters": f"{self.params:,}",
            "dense MACs": f"{self.dense_macs:,}",
            "MACs": f"{self.macs:,}",
            "as compiled": f"{self.ladder_macs:,}",
            "other ops": f"{self.other_ops:,}",
        }
        body = [tuple(show(row) for show in columns.values()) for row in self.rows]
        last = tuple(totals.get(name, "") for name in columns)
        text = _aligned([tuple(columns), *body, last])
        share = self.total_macs / max(1, self.dense_macs)
        if gated:
            compiled = (self.ladder_macs + self.other_ops / 2) / max(1, self.dense_macs)
            text += (
                f"\n{self.total_macs:,} MACs with two other ops counted as one, "
                f"{share:.3f} of the dense network's; as compiled {compiled:.3f}"
            )
        elif ranked:
            text += f"\n{share:.3f} of the dense network's MACs"
        return text


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


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
    layer `c_in c_out` a row, a factorised one the sum of its parts. Any Linen model
    whose convolutions are `nn.Conv`, `InertialConv`, `Tucker2Conv` or `LowRankConv` and
    whose linear layers are `nn.Dense` is counted; parameters count whatever holds them.

    Args:
        model: Called as `model(images)`.
        input_shape: Of one image [h, w, c], or of a batch [n, h, w, c]; MACs are those
            of one image either way.
        gate_rates: Share of open gates of inertial layers by path, as evaluation
            measures it (`LAYER/core` where the core is inertial); of the others it is
            the target of `Rate`, or 1.

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
    calls, variables = record_calls(model, shape)
    rates = dict(gate_rates or {})
    gated = {_gate_path(p, c) for p, c in calls.items()} - {None}
    for path, rate in rates.items():
        if path not in gated:
            raise ValueError(f"`gate_rates` has {path!r}, which is no inertial layer.")
        if not 0 <= rate <= 1:
            raise ValueError(f"`gate_rates` (={rate} for {path!r}) must be in [0, 1].")
    dense = {}
    plan = getattr(model, "plan", None)
    if isinstance(plan, Plan) and plan.rules:
        plain = count_cost(model.clone(plan=Plan()), shape)
        dense = {row.path: row.macs for row in plain.rows}

    owned: dict[str, dict[str, Any]] = {}
    for place, value in traverse_util.flatten_dict(
        variables["params"], sep="/"
    ).items():
        # The parts of a factorised layer are its own.
        owners = [path for path in calls if place.startswith(f"{path}/")]
        layers = [path for path in owners if calls[path].is_factorised]
        owner, _, name = place.rpartition("/")
        if layers:
            owner, name = layers[0], place.removeprefix(f"{layers[0]}/")
        owned.setdefault(owner, {})[name] = value
    rows = []
    for path in [*calls, *(path for path in owned if path not in calls)]:
        if path not in owned:
            continue
        call = calls.get(path, Call(None, (), ()))
        leaves = owned[path]
        params = sum(math.prod(value.shape) for value in leaves.values())
        macs, fields = _count_layer(path, call, calls, leaves, rates)
        kind = _kind(call.module)
        if path in dense and kind in ("inertial", "tucker2", "low_rank"):
            fields["dense_macs"] = dense[path]
        if kind in CONVOLUTIONS and kind != "inertial" and isinstance(plan, Plan):
            fields["note"] = _note(plan, path, call.module)
        rows.append(LayerCost(path, kind, call.output_shape, params, macs, **fields))
    return CostTable(tuple(rows))


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer is called.

    Attributes:
        module: The layer; None for one whose operations are not counted.
        input_shape: [n, h, w, c_in].
        output_shape: Of one image.
    """

    module: Any
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def is_factorised(self) -> bool:
        """Whether the layer's parts are layers themselves."""
        return isinstance(self.module, (Tucker2Conv, LowRankConv))


_COUNTED = (nn.Conv, nn.Dense, Pointwise, InertialConv, Tucker2Conv, LowRankConv)


def record_calls(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[dict[str, Call], Any]:
    """Returns how every layer is called, by path, and the shapes of all variables.

    Nothing is computed.

    Args:
        model: Called as `model(images)`.
        shape: Of one image [h, w, c], or of a batch.
    """
    calls: dict[str, Call] = {}

    def record(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ):
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            path = "/".join(context.module.path)
            known = calls.get(path)
            if isinstance(context.module, _COUNTED):
                # What stands in for a layer is recorded before it, at the same path.
                if known is None or not known.is_factorised:
                    x = first_argument(args, kwargs)
                    calls[path] = Call(context.module, x.shape, output.shape[1:])
            else:
                # Keeps the order of the computation; dropped if it owns nothing.
                calls.setdefault(path, Call(None, (), ()))
        return output

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, *shape[-3:]), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return calls, variables


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns what a layer is called on, whether by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _kind(module: Any) -> Kind:
    kinds: dict[Any, Kind] = {
        nn.Conv: "conv",
        nn.Dense: "dense",
        InertialConv: "inertial",
        Tucker2Conv: "tucker2",
        LowRankConv: "low_rank",
    }
    for cls, kind in kinds.items():
        if isinstance(module, cls):
            return kind
    return "other"


def _gate_path(path: str, call: Call) -> str | None:
    """Returns where the layer's gate rate is sown; None if it has no gates."""
    return path if isinstance(call.module, InertialConv) else None


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
        target = module.threshold
        default = target.target if isinstance(target, Rate) else 1.0
        rate = rates.get(path, default)
        cost = count_inertial(module, call.input_shape, call.output_shape, rate)
        return cost.pop("macs"), {"gate_rate": rate, **cost}
    if isinstance(module, (nn.Conv, nn.Dense)):
        return math.prod(call.output_shape) * _taps(leaves["kernel"]), {}
    if not call.is_factorised:
        return 0, {}
    fields: dict[str, Any] = {"ranks": _ranks(module)}
    macs = 0
    for name in ("u_in", "left", "core", "right", "u_out"):
        part = calls.get(f"{path}/{name}")
        if part is None:
            continue
        if isinstance(part.module, InertialConv):
            more, fields_of_core = _count_layer(
                f"{path}/{name}", part, calls, {}, rates
            )
            del fields_of_core["dense_macs"]
            fields |= fields_of_core
            # The factors are computed whatever the gates do.
            for key in ("core_macs", "ladder_macs"):
                fields[key] -= more
        else:
            more = math.prod(part.output_shape) * _taps(leaves[f"{name}/kernel"])
        macs += more
    for key in ("core_macs", "ladder_macs"):
        if key in fields:
            fields[key] += macs
    return macs, fields


def _taps(kernel: Any) -> int:
    """Each output sums over all but the last axis of the kernel [.., c_out]."""
    return math.prod(kernel.shape[:-1])


def _ranks(module: Tucker2Conv | LowRankConv) -> tuple[int, ...]:
    if isinstance(module, Tucker2Conv):
        return (module.rank_in, module.rank_out)
    return (module.rank,)


def _note(plan: Plan, path: str, module: Any) -> str:
    # The first of one or two dimensions.
    side, strides = (
        size if isinstance(size, int) else size[0]
        for size in (getattr(module, "kernel_size", 1), module.strides or 1)
    )
    reason = stays_dense(plan.spec(path), kernel_size=side, strides=strides)
    return reason or ""
