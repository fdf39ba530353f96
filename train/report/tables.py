"""The tables of a report: of its networks, and of the layers of each."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.evaluate.evaluation import in_points
from train.report.speed import BATCH_SIZES


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        words: Its head.
        value: A function of a row that returns its value, by which rows are sorted, or
            None where there is none.
        form: The form of the value as text; None: the value is text itself.
        text: A function of a row that returns the text, where it is no form of the
            value.
    """

    words: str
    value: Callable[[Any], Any]
    form: str | None = None
    text: Callable[[Any], str] | None = None

    def cell(self, row: Any) -> dict[str, Any]:
        """Returns the value and the text of a row."""
        value = self.value(row)
        text = "-"
        if value is not None:
            form = self.form or "{}"
            text = self.text(row) if self.text else form.format(value)
        return {"value": "" if value is None else value, "text": text}


def make_table(columns: Sequence[Column], rows: Sequence[Any]) -> dict[str, Any]:
    """Returns a table without the columns in which no row has anything.

    Returns:
        `heads` with the words of each column and whether it holds numbers, and `rows`
        of cells, each with a value and a text.
    """
    used = [c for c in columns if any(c.value(row) is not None for row in rows)]
    heads = [{"words": c.words, "is_number": c.form is not None} for c in used]
    return {"heads": heads, "rows": [[c.cell(row) for c in used] for row in rows]}


def network_table(
    subjects: Sequence[Mapping[str, Any]], device: str | None
) -> dict[str, Any]:
    """Returns the table of networks, whose first column is the number of each."""

    def of(*names: str) -> Callable[[Mapping[str, Any]], Any]:
        def value(row: Any) -> Any:
            for name in names:
                row = row and row[name]
            return row

        return value

    columns = [
        Column("#", lambda row: row["index"] + 1),
        Column("name", of("name")),
        Column("top-1", of("top1"), "{:.2%}"),
        Column(
            "points to #1",
            lambda row: row["difference"] if row["index"] else None,
            "{:+.2%}",
            text=lambda row: in_points(row["difference"], row["margin_95"]),
        ),
        Column("parameters", of("cost", "params"), "{:,}"),
        Column("MACs", of("cost", "total_macs"), "{:,}"),
        Column("of dense", _share_of_dense, "{:.0%}"),
        Column("gate rate", of("gate_rate"), "{:.1%}"),
        *(
            Column(f"ms, batch {n}", of("latency_ms", str(n), "median_ms"), "{:.3g}")
            for n in BATCH_SIZES
        ),
        Column(f"cycles, {device}", of("cycles"), "{:,}"),
        Column("network", of("family")),
        Column("form", of("form")),
        Column("data", of("data")),
        Column("epochs", of("epochs"), "{:,}"),
        Column("seed", of("seed"), "{}"),
    ]
    return make_table(columns, subjects)


def _share_of_dense(subject: Mapping[str, Any]) -> float | None:
    """Returns the share of the dense network's MACs, None for a dense network."""
    cost = subject["cost"]
    if cost is None or cost["total_macs"] == cost["dense_macs"]:
        return None
    return cost["total_macs"] / cost["dense_macs"]


def layer_table(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the table of a network's layers, and what all of them come to.

    Layers without operations, such as BatchNorm, are one row of `totals`.
    """
    # Numbers as in the computation, by which the table can be sorted again.
    rows = [
        {**row, "place": place}
        for place, row in enumerate(
            (row for row in layers if row["kind"] != "other"), start=1
        )
    ]
    columns = [
        Column("#", lambda row: row["place"], "{}"),
        Column("layer", lambda row: row["path"]),
        Column("kind", lambda row: row["kind"]),
        _sizes("output", "output_shape", " x "),
        _sizes("ranks", "ranks", ", "),
        Column("kept energy", lambda row: row["energy"], "{:.3f}"),
        Column("gate rate", lambda row: row["gate_rate"], "{:.3f}"),
        Column("parameters", lambda row: row["params"], "{:,}"),
        Column("MACs", lambda row: row["macs"], "{:,}"),
        Column("dense MACs", lambda row: row["dense_macs"], "{:,}"),
        Column("stays dense", lambda row: row["note"] or None),
    ]
    others = [row for row in layers if row["kind"] == "other"]
    totals = []
    for words, of in ((f"{len(others)} other layers", others), ("total", layers)):
        if of:
            params, macs = (sum(row[name] for row in of) for name in ("params", "macs"))
            totals.append(f"{words}: {params:,} parameters, {macs:,} MACs")
    return {**make_table(columns, rows), "totals": totals}


def _sizes(words: str, name: str, between: str) -> Column:
    """Returns the column of several numbers, which is sorted by their product."""
    return Column(
        words,
        lambda row: math.prod(row[name]) if row[name] else None,
        "{}",
        lambda row: between.join(map(str, row[name])),
    )
