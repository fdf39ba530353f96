"""The table of what a network costs, a row a layer."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from inertia_jax.layers.kinds import KindName


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
        path: The layer's path, e.g. `layer1_0/conv1`.
        kind: `conv`, `inertial`, `tucker2`, `low_rank`, `dense`, or `other`.
        output_shape: Shape of one image's output; empty for layers that are counted by
            parameters alone.
        params: Number of parameters.
        macs: Multiply-accumulates an image, without bias (FLOPs = 2 x MACs), at the
            gate rate: core evaluations of an inertial layer, closed tiles' included.
        dense_macs: MACs of the dense convolution that the layer replaces.
        core_macs: MACs of an inertial layer with every gate closed.
        ladder_macs: MACs of the capacity that holds the gate rate, which a compiled
            tiled layer takes in evaluation unless a batch has more open tiles.
        other_ops: Additions, differences, magnitudes and products of friction, box
            means and joins, which no core's MACs contain; two count as one MAC.
        gate_rate: Share of open gates that `macs` is counted at.
        ranks: (rank_in, rank_out) of a Tucker-2 layer, (rank,) of two factors.
        note: The reason why the layer is not what the plan has for it.

    Example:
        >>> row = ij.count_cost(model, (28, 28, 1)).rows[1]
        >>> row.path, row.output_shape, row.params, row.macs
        ('conv2', (24, 24, 4), 76, 41472)
    """

    path: str
    kind: KindName
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
    """The cost of a network, which prints as a table.

    Attributes:
        rows: One a layer that has parameters, in the order of the computation.

    Example:
        >>> cost = ij.count_cost(model, (28, 28, 1))
        >>> cost.params, [row.path for row in cost.rows]
        (4802, ['conv1', 'conv2', 'fc1', 'fc2'])
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
        """MACs of the network with the dense convolutions that other kinds replace."""
        return sum(_or(row.dense_macs, row.macs) for row in self.rows)

    @property
    def ladder_macs(self) -> int:
        """MACs of compiled evaluation, which takes whole capacities."""
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
        has_gates = any(row.gate_rate is not None for row in self.rows)
        has_ranks = any(row.ranks for row in self.rows)
        has_notes = any(row.note for row in self.rows)
        columns: dict[str, Callable[[LayerCost], str]] = {
            "layer": lambda r: r.path,
            "output": lambda r: "x".join(map(str, r.output_shape)),
        }
        if has_ranks:
            columns["ranks"] = lambda r: ",".join(map(str, r.ranks))
        columns["parameters"] = lambda r: f"{r.params:,}"
        if has_gates or has_ranks:
            columns["dense MACs"] = lambda r: f"{_or(r.dense_macs, r.macs):,}"
        if has_gates:
            columns["core MACs"] = lambda r: _number(r.core_macs)
            columns["gate rate"] = lambda r: (
                "" if r.gate_rate is None else f"{r.gate_rate:.3f}"
            )
        columns["MACs"] = lambda r: f"{r.macs:,}"
        if has_gates:
            columns["as compiled"] = lambda r: f"{_or(r.ladder_macs, r.macs):,}"
            columns["other ops"] = lambda r: _number(r.other_ops or None)
        if has_notes:
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
        text = aligned([tuple(columns), *body, last], left=2)
        share = self.total_macs / max(1, self.dense_macs)
        if has_gates:
            compiled = (self.ladder_macs + self.other_ops / 2) / max(1, self.dense_macs)
            text += (
                f"\n{self.total_macs:,} MACs with two other ops counted as one, "
                f"{share:.3f} of the dense network's; as compiled {compiled:.3f}, open "
                f"tiles rounded up to a capacity"
            )
        elif has_ranks:
            text += f"\n{share:.3f} of the dense network's MACs"
        return text


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def aligned(lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns lines of cells as a table whose columns are as wide as their widest cell.

    Args:
        lines: Cells of each line; a short line leaves the last columns empty.
        left: Number of first columns that are aligned to the left; the others are
            aligned to the right.
    """
    columns = []
    for index, cells in enumerate(itertools.zip_longest(*lines, fillvalue="")):
        width = max(map(len, cells))
        pad = str.ljust if index < left else str.rjust
        columns.append([pad(cell, width) for cell in cells])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
