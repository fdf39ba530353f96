"""Figures of all subjects together: learning curves, and accuracy against cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from train.report.findings import Findings, short_source
from train.report.svg import (
    FAINT,
    INK,
    Figure,
    colour,
    marker,
    new_figure,
    tag,
    to_svg,
)
from train.run.report import is_validated

_SIZE = (360, 270)
# Costs that differ by more than this factor are drawn on a logarithmic axis.
_LOGARITHMIC = 8


def draw_curves(findings: Sequence[Findings]) -> list[Figure]:
    """Returns accuracy and loss over epochs, of all runs, in training and in test.

    The curve of a run of one epoch is a point.
    """
    runs = [(i, f.subject.record) for i, f in enumerate(findings)]
    curves = [(i, record["curve"]) for i, record in runs if record]
    if not curves:
        return []
    figures = []
    some_validated = any(is_validated(curve) for _, curve in curves)
    for name, of, label, scale in (
        (
            "accuracy",
            {"--": "train_accuracy", "-": "test_top1", ":": "validation_top1"},
            "accuracy [%]",
            100,
        ),
        (
            "loss",
            {"--": "train_loss", "-": "test_loss", ":": "validation_loss"},
            "loss [nats]",
            1,
        ),
    ):
        with new_figure(*_SIZE) as (figure, axes):
            for index, curve in curves:
                epochs = [row["epoch"] for row in curve]
                for style, key in of.items():
                    if style == ":" and not is_validated(curve):
                        continue
                    is_test = style == "-"
                    (line,) = axes.plot(
                        epochs,
                        [scale * row[key] for row in curve],
                        style,
                        color=colour(index),
                        linewidth=1.8 if is_test else 1.1,
                        marker=marker(index) if len(curve) == 1 else None,
                        markerfacecolor=colour(index) if is_test else "none",
                    )
                    tag(line, index)
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.plot([], [], "-", color=INK, label="test")
            axes.plot([], [], "--", color=INK, linewidth=1.1, label="training")
            if some_validated:
                axes.plot([], [], ":", color=INK, linewidth=1.1, label="validation")
            axes.legend(frameon=False)
            title = f"{name.capitalize()} over epochs"
            svg = to_svg(figure, f"curves-{name}", title)
        caption = "Solid: test images. Dashed: training images, as they were augmented."
        if some_validated:
            caption += " Dotted: validation images, which choose the best checkpoint."
        figures.append(Figure(f"curves-{name}", title, caption, svg))
    return figures


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Returns the places of those that no other is better than, the cheapest first.

    Another is better if it costs at most as much and scores at least as high, and one
    of both is not equal.
    """
    points = list(zip(costs, scores, strict=True))

    def is_beaten(cost: float, score: float) -> bool:
        return any(
            c <= cost and s >= score and (c, s) != (cost, score) for c, s in points
        )

    front = [i for i, point in enumerate(points) if not is_beaten(*point)]
    return sorted(front, key=lambda i: points[i])


def costs_of(
    device: str | None,
) -> dict[str, tuple[str, Callable[[Findings], float | None]]]:
    """Returns what a network may cost, by name: its words, and how it is found."""

    def latency(batch: str) -> Callable[[Findings], float | None]:
        return lambda f: f.latency.get(batch, {}).get("median_ms")

    return {
        "macs": ("MACs an image", lambda f: f.cost and f.cost.total_macs),
        "params": ("parameters", lambda f: f.cost and f.cost.params),
        "latency-1": ("ms a call of 1 image, here", latency("1")),
        "latency-64": ("ms a call of 64 images, here", latency("64")),
        "cycles": (f"cycles on {device} for 64 images, estimated", lambda f: f.cycles),
    }


def draw_tradeoffs(findings: Sequence[Findings], *, device: str | None) -> list[Figure]:
    """Returns accuracy against each cost that is known, a figure for each data set.

    Accuracies on different images are not compared.
    """
    by_test_set: dict[Any, list[int]] = {}
    for i, found in enumerate(findings):
        if found.top1 is not None:
            by_test_set.setdefault(found.test_set, []).append(i)
    figures = []
    for group, places in enumerate(by_test_set.values()):
        source = findings[places[0]].source or "as recorded"
        for name, (words, cost_of) in costs_of(device).items():
            costs = {i: cost_of(findings[i]) for i in places}
            known = {i: float(cost) for i, cost in costs.items() if cost}
            if not known:
                continue
            scores = {i: 100 * float(findings[i].top1 or 0) for i in known}
            title = f"Accuracy against {words.partition(',')[0]}"
            svg = _scatter(known, scores, words, f"tradeoff-{name}-{group}", title)
            caption = (
                f"{short_source(source)}{which_networks(places, findings)}. Rings and "
                f"the line mark the Pareto front: the networks than which none is "
                f"both cheaper and better."
            )
            figures.append(Figure(f"tradeoff-{name}-{group}", title, caption, svg))
    return figures


def which_networks(places: Iterable[int], findings: Sequence[Findings]) -> str:
    """Returns which networks a figure is of, where others are of other test images."""
    if len({found.test_set for found in findings if found.top1 is not None}) < 2:
        return ""
    return f", networks {', '.join(str(place + 1) for place in places)}"


def _scatter(
    costs: Mapping[int, float],
    scores: Mapping[int, float],
    words: str,
    name: str,
    title: str,
) -> Markup:
    from matplotlib import ticker

    places = list(costs)
    front = pareto_front([*costs.values()], [*scores.values()])
    best = [places[i] for i in front]
    with new_figure(*_SIZE) as (figure, axes):
        sides = _free_sides(costs, scores)
        steps = ([costs[i] for i in best], [scores[i] for i in best])
        (line,) = axes.step(
            *steps, where="post", color=FAINT, linewidth=1, linestyle=":"
        )
        line.set_gid("front")
        for i in places:
            (point,) = axes.plot(
                costs[i], scores[i], marker(i), color=colour(i), markersize=6
            )
            tag(point, i)
            if i in best:
                (ring,) = axes.plot(
                    *(costs[i], scores[i], "o"),
                    markerfacecolor="none",
                    markeredgecolor=INK,
                    markersize=12,
                    markeredgewidth=1,
                )
                tag(ring, i)
            text = axes.annotate(
                str(i + 1),
                (costs[i], scores[i]),
                textcoords="offset points",
                xytext=sides[i],
                horizontalalignment="left" if sides[i][0] > 0 else "right",
                fontsize=9.5,
                color=FAINT,
            )
            tag(text, i)
        values = np.array([*costs.values()])
        if values.max() > _LOGARITHMIC * values.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda cost, _: _shortened(cost))
        axes.margins(0.12)
        axes.set(xlabel=words, ylabel="test top-1 [%]")
        return to_svg(figure, name, title)


def _shortened(cost: float) -> str:
    """Returns a cost in few letters, such as 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if cost >= size:
            return f"{cost / size:g}{letter}"
    return f"{cost:g}"


def _free_sides(
    costs: Mapping[int, float], scores: Mapping[int, float]
) -> dict[int, tuple[float, float]]:
    """Returns on which side of each point its number stands, in points.

    Numbers of points that lie close together stand on different sides.
    """
    sides = ((8, -9), (8, 4), (-8, 4), (-8, -9))
    widths = [float(np.ptp([*values.values()])) or 1 for values in (costs, scores)]
    found: dict[int, tuple[float, float]] = {}
    for i in costs:
        near = [
            found[j]
            for j in found
            if abs(costs[i] - costs[j]) < 0.06 * widths[0]
            and abs(scores[i] - scores[j]) < 0.06 * widths[1]
        ]
        free = [side for side in sides if side not in near]
        found[i] = (free or sides)[0]
    return found
