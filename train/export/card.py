"""The README of an exported network: what it is, how good, and how it is loaded."""

import json
from typing import Any

from inertia_jax import __version__
from inertia_jax.metadata import both_sides
from inertia_jax.models.create import model_name
from train.export.formats import Job
from train.own_network import OwnNetwork


def model_card(job: Job, load: str, *, library: str) -> str:
    """Returns a model card in Markdown, as the Hugging Face Hub reads it.

    Args:
        job: What is exported.
        load: How it is loaded, in Markdown.
        library: The library that loads it, by its name on the Hub.
    """
    network = job.network
    model = network.model
    own = isinstance(model, OwnNetwork)
    name = model.factory if isinstance(model, OwnNetwork) else model_name(model)
    cost = network.cost(network.gate_rates)
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        "- inertia_jax",
        "---",
        "",
        f"# {name}" + (" (a network of the user's own)" if own else ""),
        "",
        "## Loading",
        "",
        load,
        "## Network",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {cost.params:,} |",
        f"| multiply-accumulates an image | {cost.total_macs:,} |",
        f"| of the dense network | {cost.dense_macs:,} |",
        f"| classes | {len(network.class_names) or 'without names'} |",
        *_metrics(network.info),
        f"| written by | inertia_jax {__version__}, from `{job.path.name}` |",
        "",
        *_preprocessing(job),
        *_names(network.class_names),
        "## Plan",
        "",
        "What stands in the place of the network's own convolutions, rule by rule:",
        "",
        "```json",
        json.dumps(json.loads(model.plan.to_json()), indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _metrics(info: Any) -> list[str]:
    evaluation = info.get("evaluation")
    rows = []
    if isinstance(evaluation, dict):
        rows = [
            f"| {name} on the test set | {value:.4g} |"
            for name, value in evaluation.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
    config = info.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    if isinstance(data, dict) and data.get("source"):
        rows.append(f"| trained on | `{data['source']}` |")
    return rows


def _preprocessing(job: Job) -> list[str]:
    preprocessing = job.network.preprocessing
    height, width = preprocessing.image_shape[:2]
    resized = both_sides(preprocessing.resized_sides)
    return [
        "## Preprocessing",
        "",
        f"Images are resized to cover {resized[0]} x {resized[1]} pixels (height x "
        f"width; bilinear, antialiased), the central {height} x {width} are cut out, "
        f"and each channel becomes `(pixels / 255 - mean) / std` with",
        "",
        f"    mean = {preprocessing.mean}",
        f"    std = {preprocessing.std}",
        "",
    ]


def _names(class_names: tuple[str, ...]) -> list[str]:
    if not class_names:
        return []
    rows = [f"{number}. {name}" for number, name in enumerate(class_names)]
    return ["## Classes", "", *rows, ""]
