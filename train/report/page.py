"""The page and the Markdown of a report, from its findings and its record."""

import base64
import io
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from train.report.class_figures import draw_classes, draw_confusion, worst_pairs
from train.report.findings import Findings, short_source
from train.report.gate_maps import layer_to_json
from train.report.layer_figures import draw_gate_rates, draw_kernels
from train.report.overview import draw_curves, draw_tradeoffs
from train.report.svg import NUM_COLOURS, Figure
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
    drawn = _figures(findings, record["device"])
    html = environment.get_template("page.html.j2").render(
        **context, **drawn, maps=_maps(findings), num_colours=NUM_COLOURS
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
            notes.append(f"{found.subject.name}: without {missing}: {why}.")
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


def _figures(findings: Sequence[Findings], device: str | None) -> dict[str, Any]:
    """Returns the sections of figures, and what the page has, in order."""
    gates = draw_gate_rates(findings)
    confusions = [
        draw_confusion(found.evaluation, index)
        for index, found in enumerate(findings)
        if found.evaluation is not None
    ]
    sections: list[dict[str, Any]] = []

    def add(id: str, title: str, figures: Sequence[Figure], single: Any = ()) -> None:
        groups = [
            {
                "id": name,
                "indices": [figure.subject for figure in of_one],
                "figures": of_one,
            }
            for name, of_one in single
            if of_one
        ]
        sections.append(
            {
                "id": id,
                "title": title,
                "figures": figures,
                "single": groups,
                "legend": _subjects_in(
                    [*figures, *(f for _, of in single for f in of)]
                ),
            }
        )

    add("curves", "Learning curves", draw_curves(findings))
    add("tradeoffs", "Accuracy against cost", draw_tradeoffs(findings, device=device))
    add("kernels", "Ranks and kept energy", draw_kernels(findings))
    add(
        "gates",
        "Gate rates",
        [figure for figure in gates if figure.subject is None],
        [("course", [figure for figure in gates if figure.subject is not None])],
    )
    add("classes", "Classes", draw_classes(findings), [("confusion", confusions)])
    contents = [("networks", "Networks")]
    contents += [(s["id"], s["title"]) for s in sections if s["figures"]]
    if any(found.maps for found in findings):
        contents.append(("maps", "Friction and gates on images"))
    if any(found.cost for found in findings):
        contents.append(("layers", "Layers"))
    contents.append(("origins", "How they were made"))
    return {"sections": sections, "contents": contents}


def _subjects_in(figures: Sequence[Figure]) -> list[int]:
    """Returns the subjects that figures have parts of, if there are several."""
    found = {
        int(i) for f in figures for i in re.findall(r'data-subject="(\d+)"', f.svg)
    }
    return sorted(found) if len(found) > 1 else []


def _maps(findings: Sequence[Findings]) -> list[dict[str, Any]]:
    """Returns what the page's script draws maps from."""
    maps = []
    for index, found in enumerate(findings):
        if found.maps is None or found.evaluation is None:
            continue
        names = found.evaluation.class_names
        pictures = [
            {"image": _data_url(image), "label": names[label], "answer": names[answer]}
            for image, label, answer in zip(
                found.maps.images, found.maps.labels, found.maps.answers, strict=True
            )
        ]
        layers = [layer_to_json(layer) for layer in found.maps.layers]
        maps.append({"subject": index, "pictures": pictures, "layers": layers})
    return maps


def _data_url(image: np.ndarray) -> str:
    """Returns an image as the address of a PNG, which holds it."""
    stream = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).convert("RGB").save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
