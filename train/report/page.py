"""The page and the Markdown of a report, from its findings and its record."""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from train.report.class_figures import worst_pairs
from train.report.findings import Findings, short_source
from train.report.gate_maps import maps_to_json
from train.report.sections import draw_sections
from train.report.svg import NUM_COLOURS
from train.report.tables import layer_table, network_table
from train.run.report import in_words


def render(
    findings: Sequence[Findings], record: Mapping[str, Any], *, page: str
) -> tuple[str, str]:
    """Returns the texts of the HTML page and of the Markdown file.

    Args:
        findings: What was found out.
        record: Its record, of `make_report_record`.
        page: The name of the file of the page, which the Markdown tells.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    context = _context(findings, record)
    maps = [
        maps_to_json(index, found.maps, found.evaluation.class_names)
        for index, found in enumerate(findings)
        if found.maps is not None and found.evaluation is not None
    ]
    html = environment.get_template("page.html.j2").render(
        **context,
        sections=draw_sections(findings, record["device"]),
        maps=maps,
        num_colours=NUM_COLOURS,
    )
    markdown = environment.get_template("page.md.j2").render(**context, page=page)
    return html, markdown


def _context(findings: Sequence[Findings], record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what both texts say."""
    subjects = [
        _subject(index, found, entry)
        for index, (found, entry) in enumerate(
            zip(findings, record["subjects"], strict=True)
        )
    ]
    names = [subject["name"] for subject in subjects]
    title = f"Report of {names[0]}"
    if len(names) > 1:
        title = f"Report of {len(names)} networks"
    made = time.strftime("Made on %d %B %Y at %H:%M.")
    return {
        "title": title,
        "made": made,
        "subjects": subjects,
        "networks": network_table(subjects, record["device"]),
        "notes": _notes(findings, record),
        "machine": _machine(record["machine"]),
        "command": record["machine"]["command"],
    }


def _notes(findings: Sequence[Findings], record: Mapping[str, Any]) -> list[str]:
    """Returns how the numbers of the table are meant, and why some are missing."""
    notes = []
    if any(found.evaluation for found in findings):
        notes.append(
            "top-1: the accuracy on all test images, measured for this report with the "
            "best checkpoint of a run. Where test images chose that checkpoint, it is "
            "a little too high."
        )
    if any(found.top1 is not None and not found.evaluation for found in findings):
        notes.append(
            "Networks without data have the accuracy that their training recorded."
        )
    notes.append(
        "MACs: multiply-accumulates an image at the measured gate rates, with two "
        "operations of friction counted as one."
    )
    if record["latency"]:
        notes.append(
            f"ms: the median time of a call on {_machine(record['latency']['machine'])}"
            f", BatchNorm folded, all networks in turn."
        )
    if record["device"]:
        notes.append(
            f"cycles: what the compiler of {record['device']} expects of a call of "
            f"{record['cycles_batch']} images in bfloat16; nothing was measured there."
        )
    for found in findings:
        for what, why in found.left_out.items():
            missing = _MISSING[what]
            reason = why.removesuffix(".")
            notes.append(f"{found.subject.name}: without {missing}: {reason}.")
    return notes


_MISSING = {
    "network": "accuracy, costs and layers",
    "data": "measured accuracy, classes and maps",
    "kernels": "kept energy",
}


def _subject(index: int, found: Findings, entry: Mapping[str, Any]) -> dict[str, Any]:
    record, rates = found.subject.record, list(found.gate_rates.values())
    starts = record["starts"] if record else []
    machines = dict.fromkeys(_machine(start) for start in starts)
    seconds_to = record.get("seconds_to", {}) if record else {}
    evaluation = found.evaluation
    origins = found.subject.origins
    commands = [command for origin in origins for command in origin.commands]
    if not commands:
        commands = [start["command"] for start in starts if "command" in start]
    return {
        **entry,
        "source": found.source,
        "data": short_source(found.source) if found.source else None,
        "imported_from": dict.fromkeys(
            origin["imported_from"]
            for origin in entry["origins"]
            if origin["imported_from"]
        ),
        "index": index,
        "epochs": record["curve"][-1]["epoch"] if record else None,
        "gate_rate": sum(rates) / len(rates) if rates else None,
        "machines": list(machines),
        "commands": commands,
        "seconds_to": [(f"{float(s):.2%}", in_words(r)) for s, r in seconds_to.items()],
        "table": layer_table(entry["layers"]) if entry["layers"] else None,
        "per_class": _per_class(found),
        "worst": worst_pairs(evaluation) if evaluation else [],
    }


def _per_class(found: Findings) -> list[dict[str, Any]]:
    if found.evaluation is None:
        return []
    confusion, names = found.evaluation.confusion, found.evaluation.class_names
    rows = []
    for place, share in enumerate(found.evaluation.per_class):
        wrong = np.where(np.arange(len(names)) == place, 0, confusion[place])
        count, most = int(confusion[place].sum()), int(wrong.argmax())
        mistaken = f"{names[most]} ({wrong[most]})" if wrong.any() else ""
        rows.append(
            {
                "name": names[place],
                "count": count,
                "share": float(share) if count else None,
                "mistaken": mistaken,
            }
        )
    return rows


def _machine(start: Mapping[str, Any]) -> str:
    """Returns hardware and versions in words."""
    versions = start.get("versions") or {}
    cpus = f"{start.get('num_cpus')} cores" if start.get("num_cpus") else ""
    device = start.get("device") if start.get("backend") != "cpu" else ""
    words = [start.get("cpu"), cpus, device]
    words += [f"{name} {version}" for name, version in versions.items()]
    if start.get("python"):
        words.append(f"Python {start['python']}")
    return ", ".join(str(word) for word in words if word)
