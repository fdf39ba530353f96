"""The record of a report: everything that its page says, as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluate.evaluation import paired_difference
from train.networks import cost_to_json
from train.report.findings import Findings
from train.run.directory import describe_machine

_FORMS = {"tucker2": "Tucker-2", "low_rank": "two factors", "inertial": "inertial"}


def make_report_record(
    findings: Sequence[Findings],
    *,
    latency: Mapping[str, Any] | None,
    device: str | None,
    cycles_batch: int,
) -> dict[str, Any]:
    """Returns the record of a report.

    What the record of a single run has, as `make_record` returns it, also stands at its
    top.

    Args:
        findings: What was found out.
        latency: What `measure_latency` returned, if anything was timed.
        device: The chip whose compiler estimated cycles.
        cycles_batch: The number of images a call of that estimate.
    """
    alone = findings[0].subject.record if len(findings) == 1 else None
    return {
        **(alone or {}),
        "machine": describe_machine(),
        "device": device,
        "cycles_batch": cycles_batch if device else None,
        "latency": latency,
        "subjects": [_subject(found, findings[0]) for found in findings],
    }


def _subject(found: Findings, first: Findings) -> dict[str, Any]:
    difference, margin = _difference(found, first)
    subject, evaluation = found.subject, found.evaluation
    checkpoint = subject.network.path if subject.network else None
    return {
        "name": subject.name,
        "path": str(subject.path),
        "checkpoint": str(checkpoint) if checkpoint else None,
        "sha256": subject.sha256 or None,
        "family": found.family or None,
        "form": form_of(found),
        "data": found.source,
        "seed": _seed(found),
        "top1": found.top1,
        "difference": difference,
        "margin_95": margin,
        "evaluation": json.loads(evaluation.to_json()) if evaluation else None,
        "cost": cost_to_json(found.cost) if found.cost else None,
        "layers": _layers(found),
        "latency_ms": dict(found.latency) or None,
        "cycles": found.cycles,
        "training": subject.record,
        "origins": [
            {
                "path": str(origin.path),
                "imported_from": origin.info.get("imported_from"),
                "commands": list(origin.commands),
            }
            for origin in subject.origins
        ],
        "left_out": dict(found.left_out),
    }


def _difference(
    found: Findings, first: Findings
) -> tuple[float, float] | tuple[None, None]:
    """Returns the paired difference to the first, where both are of the same images."""
    one, other = first.evaluation, found.evaluation
    if one is None or other is None or first.test_set != found.test_set:
        return None, None
    return paired_difference(one, other)


def form_of(found: Findings) -> str | None:
    """Returns the kinds of layers that are not ordinary, or `dense`."""
    if found.cost is None:
        return None
    kinds = [row.kind for row in found.cost.rows]
    forms = [word for kind, word in _FORMS.items() if kind in kinds]
    return " and ".join(forms) or "dense"


def _seed(found: Findings) -> int | None:
    """Returns the seed of the run, or of the compression."""
    network = found.subject.network
    record = found.subject.record
    options = record["config"] if record else {}
    if not record and network is not None:
        for key in ("compressed", "config"):
            options = network.info.get(key) or options
            if options:
                break
    seed = options.get("seed")
    return seed if isinstance(seed, int) else None


def _layers(found: Findings) -> list[dict[str, Any]]:
    """Returns the rows of the table of layers: costs, and the energy of factors."""
    energies = {row.path: row.energy for row in found.kernels}
    return [
        {**dataclasses.asdict(row), "energy": energies.get(row.path)}
        for row in (found.cost.rows if found.cost else ())
    ]
