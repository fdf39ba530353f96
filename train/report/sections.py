"""The sections of figures, in the order of the page."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.report.class_figures import draw_classes, draw_confusion
from train.report.findings import Findings
from train.report.layer_figures import draw_gate_rates, draw_kernels
from train.report.overview import draw_curves, draw_tradeoffs
from train.report.svg import Figure


def draw_sections(
    findings: Sequence[Findings], device: str | None
) -> list[dict[str, Any]]:
    """Returns the sections that have figures.

    Each has an `id`, a `title` and the `figures` of all subjects together. `single` has
    groups of figures, of which the page shows those of one subject at a time. `legend`
    has the subjects that are drawn.
    """
    gates = draw_gate_rates(findings)
    confusions = [
        draw_confusion(found.evaluation, index)
        for index, found in enumerate(findings)
        if found.evaluation is not None
    ]
    together = [figure for figure in gates if figure.subject is None]
    courses = [figure for figure in gates if figure.subject is not None]
    tradeoffs = draw_tradeoffs(findings, device=device)
    sections = [
        _section("curves", "Learning curves", draw_curves(findings)),
        _section("tradeoffs", "Accuracy against cost", tradeoffs),
        _section("kernels", "Ranks and kept energy", draw_kernels(findings)),
        _section("gates", "Gate rates", together, course=courses),
        _section("classes", "Classes", draw_classes(findings), confusion=confusions),
    ]
    return [section for section in sections if section["figures"]]


def _section(
    id: str, title: str, figures: Sequence[Figure], **single: Sequence[Figure]
) -> dict[str, Any]:
    groups: list[Mapping[str, Any]] = [
        {"id": name, "figures": group, "indices": [f.subject for f in group]}
        for name, group in single.items()
        if group
    ]
    every = [*figures, *(figure for group in single.values() for figure in group)]
    # A legend of one subject says nothing.
    pattern = re.compile(r'data-subject="(\d+)"')
    subjects = {int(index) for f in every for index in pattern.findall(f.svg)}
    legend = sorted(subjects) if len(subjects) > 1 else []
    return {
        "id": id,
        "title": title,
        "figures": figures,
        "single": groups,
        "legend": legend,
    }
