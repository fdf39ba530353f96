"""Figures of layers: ranks and kept energy, gate rates by layer and over training."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.report.findings import Findings
from train.report.svg import Figure, colour, heat, marker, new_figure, tag, to_svg

_WIDTH, _ROW, _REST = 360, 15, 62


def draw_kernels(findings: Sequence[Findings]) -> list[Figure]:
    """Returns the ranks and the kept energy of the layers that became factors."""
    figures = []
    for number, (family, group) in enumerate(_families(findings, lambda f: f.kernels)):
        layers = _in_order([row.path for row in findings[i].kernels] for i in group)
        energies = {
            i: {row.path: 100 * row.energy for row in findings[i].kernels}
            for i in group
        }
        title = f"Kept energy of {family}, by layer"
        with _layer_figure(layers) as (figure, axes):
            _draw_lines(axes, layers, energies)
            axes.set(xlabel="kept energy [%]")
            svg = to_svg(figure, f"energy-{number}", title)
        caption = (
            "The share of the squared norm of each kernel that its factors have kept, "
            "before any fine-tuning."
        )
        figures.append(Figure(f"energy-{number}", title, caption, svg))
        title = f"Ranks of {family}, by layer"
        with _layer_figure(layers) as (figure, axes):
            for which, fill in ((0, True), (-1, False)):
                shares = {
                    i: {
                        row.path: 100 * _rank_shares(row.ranks, row.shape)[which]
                        for row in findings[i].kernels
                    }
                    for i in group
                }
                _draw_lines(axes, layers, shares, fill=fill)
            axes.set(xlabel="rank [% of the channels]", xlim=(0, 105))
            svg = to_svg(figure, f"ranks-{number}", title)
        caption = "Filled, solid: input channels. Hollow, dashed: output channels."
        figures.append(Figure(f"ranks-{number}", title, caption, svg))
    return figures


def _rank_shares(ranks: Sequence[int], shape: Sequence[int]) -> tuple[float, float]:
    """Returns the ranks as shares of the channels in and out of a kernel."""
    if len(ranks) == 1:  # two factors
        share = ranks[0] / min(shape[-2:])
        return share, share
    return ranks[0] / shape[-2], ranks[-1] / shape[-1]


def draw_gate_rates(findings: Sequence[Findings]) -> list[Figure]:
    """Returns the gate rate of each inertial layer, and its course in training."""
    figures = []
    for number, (family, group) in enumerate(
        _families(findings, lambda f: f.gate_rates)
    ):
        rates = {
            i: {path: 100 * r for path, r in findings[i].gate_rates.items()}
            for i in group
        }
        layers = _in_order(rates[i] for i in group)
        title = f"Gate rate of {family}, by layer"
        with _layer_figure(layers) as (figure, axes):
            _draw_lines(axes, layers, rates)
            axes.set(xlabel="open gates [%]", xlim=(-2, 102))
            svg = to_svg(figure, f"gates-{number}", title)
        caption = "The share of open gates on the test images."
        figures.append(Figure(f"gates-{number}", title, caption, svg))
    courses = {}
    for i, found in enumerate(findings):
        curve = found.subject.record["curve"] if found.subject.record else []
        if any(row.get("test_gate_rates") for row in curve):
            courses[i] = [row for row in curve if row.get("test_gate_rates")]
    if courses:
        figures.append(_draw_means(courses))
    return figures + [_draw_course(i, curve) for i, curve in courses.items()]


def _draw_means(courses: Mapping[int, Sequence[Mapping[str, Any]]]) -> Figure:
    title = "Mean gate rate over training"
    with new_figure(_WIDTH, 270) as (figure, axes):
        for i, curve in courses.items():
            epochs = [row["epoch"] for row in curve]
            test = [100 * np.mean([*row["test_gate_rates"].values()]) for row in curve]
            train = [100 * (row["train_gate_rate"] or np.nan) for row in curve]
            for values, style in ((test, "-"), (train, "--")):
                (line,) = axes.plot(
                    *(epochs, values, style),
                    color=colour(i),
                    linewidth=1.8 if style == "-" else 1.1,
                    marker=marker(i) if len(curve) == 1 else None,
                )
                tag(line, i)
        axes.set(xlabel="epoch", ylabel="open gates [%]", ylim=(0, 102))
        axes.xaxis.get_major_locator().set_params(integer=True)
        svg = to_svg(figure, "gates-mean", title)
    caption = "The mean over the layers. Solid: test images. Dashed: training images."
    return Figure("gates-mean", title, caption, svg)


def _draw_course(index: int, curve: Sequence[Mapping[str, Any]]) -> Figure:
    layers = _in_order(row["test_gate_rates"] for row in curve)
    rates = np.array(
        [[row["test_gate_rates"].get(p, 0) for row in curve] for p in layers]
    )
    first, last = curve[0]["epoch"], curve[-1]["epoch"]
    name, title = f"gates-course-{index}", "Gate rate by layer and epoch"
    with _layer_figure(layers) as (figure, axes):
        extent = (first - 0.5, last + 0.5, len(layers) - 0.5, -0.5)
        heat(axes, rates, extent=extent)
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        svg = to_svg(figure, name, title)
    lowest, highest = rates.min(), rates.max()
    caption = (
        f"The stronger the colour, the more gates are open, from none to all; here "
        f"{lowest:.0%} to {highest:.0%}, on the test images."
    )
    return Figure(name, title, caption, svg, subject=index)


def _families(findings: Sequence[Findings], has: Any) -> list[tuple[str, list[int]]]:
    """Returns the subjects that have something, by the name of their network."""
    families: dict[str, list[int]] = {}
    for i, found in enumerate(findings):
        if has(found):
            families.setdefault(found.family, []).append(i)
    return list(families.items())


def _in_order(lists: Any) -> list[str]:
    """Returns every path once, in the order in which they are met."""
    return list(dict.fromkeys(path for paths in lists for path in paths))


@contextlib.contextmanager
def _layer_figure(layers: Sequence[str]) -> Iterator[Any]:
    """Yields a figure with a row for each layer, the first one on top."""
    with new_figure(_WIDTH, _REST + _ROW * len(layers)) as (figure, axes):
        axes.set_yticks(range(len(layers)), layers, fontsize=9)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        yield figure, axes


def _draw_lines(
    axes: Any,
    layers: Sequence[str],
    values: Mapping[int, Mapping[str, float]],
    *,
    fill: bool = True,
) -> None:
    """Draws a value at each layer, of each subject."""
    for i, by_path in values.items():
        places = [(y, by_path[p]) for y, p in enumerate(layers) if p in by_path]
        (line,) = axes.plot(
            [value for _, value in places],
            [y for y, _ in places],
            linestyle="-" if fill else "--",
            color=colour(i),
            marker=marker(i),
            markersize=4.5,
            markerfacecolor=colour(i) if fill else "none",
            linewidth=1,
        )
        tag(line, i)
