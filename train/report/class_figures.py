"""Figures of classes: the accuracy of each, and which is taken for which."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.evaluate.evaluation import Evaluation
from train.report.findings import Findings, short_source
from train.report.overview import which_networks
from train.report.svg import (
    INK,
    Figure,
    colour,
    heat,
    marker,
    new_figure,
    tag,
    to_svg,
)

# With more classes, only those of the lowest accuracy are drawn, and no numbers.
_MOST_CLASSES = 40
_MOST_NUMBERS = 20


def draw_classes(findings: Sequence[Findings]) -> list[Figure]:
    """Returns the accuracy of each class, of all networks with the same classes."""
    groups: dict[tuple[Any, tuple[str, ...]], dict[int, Evaluation]] = {}
    for i, found in enumerate(findings):
        if found.evaluation is not None:
            key = (found.test_set, found.evaluation.class_names)
            groups.setdefault(key, {})[i] = found.evaluation
    figures = []
    for number, ((_, names), group) in enumerate(groups.items()):
        source = findings[next(iter(group))].source or ""
        shares = {i: 100 * e.per_class for i, e in group.items()}
        means = np.mean([*shares.values()], axis=0)
        shown = np.flatnonzero(~np.isnan(means))
        which = "Every class"
        if len(shown) > _MOST_CLASSES:
            lowest = np.argsort(means[shown], kind="stable")[:_MOST_CLASSES]
            shown = shown[np.sort(lowest)]
            which = f"The {_MOST_CLASSES} classes of the lowest accuracy"
        title = "Accuracy by class"
        with new_figure(360, 62 + 16 * len(shown)) as (figure, axes):
            # Equal accuracies do not hide each other.
            heights = np.linspace(-0.28, 0.28, len(shares)) if len(shares) > 1 else [0]
            for (i, share), height in zip(shares.items(), heights, strict=True):
                (points,) = axes.plot(
                    share[shown],
                    np.arange(len(shown)) + height,
                    marker(i),
                    color=colour(i),
                    markersize=4,
                )
                tag(points, i)
            axes.set_yticks(range(len(shown)), [names[c] for c in shown])
            axes.set_ylim(len(shown) - 0.5, -0.5)
            axes.set(xlabel="test top-1 [%]")
            svg = to_svg(figure, f"classes-{number}", title)
        whose = which_networks(group, findings)
        caption = f"{short_source(source)}{whose}. {which}."
        figures.append(Figure(f"classes-{number}", title, caption, svg))
    return figures


def draw_confusion(evaluation: Evaluation, index: int) -> Figure:
    """Returns a confusion matrix: a row for each class, a column for each answer."""
    names, counts = evaluation.class_names, evaluation.confusion
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    count, has_numbers = len(names), len(names) <= _MOST_NUMBERS
    name, title = f"confusion-{index}", "Confusion matrix"
    with new_figure(360, 350) as (figure, axes):
        heat(axes, shares)
        axes.grid(False)
        if has_numbers:
            axes.set_xticks(range(count), names, rotation=90)
            axes.set_yticks(range(count), names)
            for row, column in np.argwhere(counts):
                number = axes.text(
                    *(column, row, str(counts[row, column])),
                    horizontalalignment="center",
                    verticalalignment="center_baseline",
                    fontsize=min(9, 120 / count),
                    color=INK,
                )
                number.set_in_layout(False)  # which would measure every one
        axes.set(xlabel="answer", ylabel="class")
        svg = to_svg(figure, name, title)
    caption = (
        "Rows are the classes of the images, columns the answers. The stronger the "
        "colour, the greater the share of the row; on the diagonal, answers are right."
    )
    return Figure(name, title, caption, svg, subject=index)


def worst_pairs(evaluation: Evaluation, count: int = 5) -> list[tuple[str, str, int]]:
    """Returns the commonest mistakes: the class, the answer, the number of images."""
    wrong = evaluation.confusion - np.diag(np.diag(evaluation.confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    rows, columns = np.unravel_index(order, wrong.shape)
    names = evaluation.class_names
    return [
        (names[row], names[column], int(wrong[row, column]))
        for row, column in zip(rows, columns, strict=True)
        if wrong[row, column]
    ]
