"""Two networks side by side: in what they differ, as values and in words."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from inertia_jax.cost.table import LayerCost, aligned
from train.config_file import differing_fields
from train.evaluate.evaluation import Evaluation, paired_difference
from train.networks import (
    TrainedNetwork,
    cost_in_words,
    cost_to_json,
    model_config,
    name_in_words,
)


def compare_networks(first: TrainedNetwork, second: TrainedNetwork) -> dict[str, Any]:
    """Returns in what two networks differ, as JSON has it.

    Returns:
        `description`, a line for each difference of networks, preprocessing and class
        names; `costs`, those of the two networks; `layers`, both costs of each layer
        that differs, None where a network has no such layer; `variables`, a row for
        each that differs, the largest relative difference first, with what is in one
        network alone at the beginning.
    """
    costs = [network.cost() for network in (first, second)]
    by_path = [{row.path: row for row in cost.rows} for cost in costs]
    layers = [
        {"path": path, "first": one, "second": other}
        for path in dict.fromkeys([*by_path[0], *by_path[1]])
        for one, other in [[_layer(rows.get(path)) for rows in by_path]]
        if one != other
    ]
    return {
        "description": differing_fields(_describe(first), _describe(second)),
        "networks": [name_in_words(n.model) for n in (first, second)],
        "costs": [cost_to_json(cost) for cost in costs],
        "costs_in_words": list(map(cost_in_words, costs)),
        "layers": layers,
        "num_variables": len(_flat(first) | _flat(second)),
        "variables": compare_variables(_flat(first), _flat(second)),
    }


def _describe(network: TrainedNetwork) -> dict[str, Any]:
    # The plans are compared layer by layer.
    config = dataclasses.replace(model_config(network.model), plan="[]")
    return {
        "model": dataclasses.asdict(config),
        "num_classes": network.model.num_classes,
        "preprocessing": dataclasses.asdict(network.preprocessing),
        "class_names": list(network.class_names),
    }


def _flat(network: TrainedNetwork) -> dict[str, Any]:
    return traverse_util.flatten_dict(network.variables, sep="/")


def _layer(row: LayerCost | None) -> dict[str, Any] | None:
    if row is None:
        return None
    names = ("kind", "ranks", "output_shape", "params", "macs")
    return {name: getattr(row, name) for name in names}


def compare_variables(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns a row for each variable that is not the same in both, by `/` path.

    A row has `path` and `shapes`, None for a variable that is not there. Where the
    shapes are the same, it has `largest`, the largest difference of two numbers, and
    `relative`, `|a - b| / |a|` in the Euclidean norm, infinite for a first variable of
    zeros. What is not a number in one of them differs by infinity.
    """
    rows = []
    for path in {**first, **second}:
        shapes = [np.shape(v[path]) if path in v else None for v in (first, second)]
        row: dict[str, Any] = {"path": path, "shapes": shapes}
        if None in shapes or shapes[0] != shapes[1]:
            rows.append(row | {"largest": None, "relative": None})
            continue
        one, other = (np.asarray(v[path], np.float64) for v in (first, second))
        if np.array_equal(one, other, equal_nan=True):
            continue
        change = np.nan_to_num(np.abs(one - other), nan=np.inf)
        size = np.linalg.norm(one)
        share = np.linalg.norm(change) / size if size else np.inf
        rows.append(row | {"largest": float(change.max()), "relative": float(share)})
    return sorted(
        rows, key=lambda row: np.inf if row["relative"] is None else row["relative"]
    )[::-1]


def compare_answers(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """Returns for which test images two networks answer differently.

    Classes are the same by their names, where both networks have the same names.

    Raises:
        ValueError: The evaluations are of different examples.
    """
    difference, margin = paired_difference(first, second)
    answers = second.predictions
    if sorted(first.class_names) == sorted(second.class_names):
        places = {name: place for place, name in enumerate(first.class_names)}
        if len(places) == len(first.class_names):
            answers = np.array([places[name] for name in second.class_names])[answers]
    differ = np.flatnonzero(first.predictions != answers)
    pairs = collections.Counter(
        (
            first.class_names[first.predictions[i]],
            second.class_names[second.predictions[i]],
        )
        for i in differ
    )
    return {
        "num_examples": first.num_examples,
        "top1": [first.top1, second.top1],
        "difference": difference,
        "margin_95": margin,
        "num_differing": len(differ),
        "only_first_right": int((first.right & ~second.right).sum()),
        "only_second_right": int((second.right & ~first.right).sum()),
        "indices": differ.tolist(),
        "changes": [
            {"first": one, "second": other, "count": count}
            for (one, other), count in pairs.most_common()
        ],
    }


def in_words(found: Mapping[str, Any], *, most: int) -> str:
    """Returns what `compare_networks` and `compare_answers` found, as text.

    Args:
        found: The result of the first, with that of the second as `answers`.
        most: The number of variables and of changed answers that are listed.
    """
    parts = []
    names, costs = found["networks"], found["costs_in_words"]
    if found["description"] or found["layers"] or names[0] != names[1]:
        parts += [f"first   {names[0]}: {costs[0]}", f"second  {names[1]}: {costs[1]}"]
    else:
        parts.append(f"the same network and plan, {names[0]}: {costs[0]}")
    parts += found["description"]
    if found["layers"]:
        parts += ["", _layers_in_words(found["layers"])]
    parts += ["", _variables_in_words(found, most)]
    if "answers" in found:
        parts += ["", _answers_in_words(found["answers"], most)]
    return "\n".join(parts)


def _layers_in_words(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = [["layer", "first", "second", "parameters", "MACs"]]
    for layer in layers:
        sides = [layer["first"], layer["second"]]
        kinds = [
            "" if s is None else " ".join([s["kind"], ",".join(map(str, s["ranks"]))])
            for s in sides
        ]
        numbers = [
            " -> ".join("none" if s is None else f"{s[name]:,}" for s in sides)
            for name in ("params", "macs")
        ]
        rows.append([layer["path"], *kinds, *numbers])
    return aligned(rows, left=3)


def _variables_in_words(found: Mapping[str, Any], most: int) -> str:
    rows, number = found["variables"], found["num_variables"]
    if not rows:
        return f"all {number:,} variables are the same"
    compared = [row for row in rows if row["relative"] is not None]
    text = f"{number:,} variables: {len(compared):,} have other values"
    for words, is_one in (
        ("are in the first alone", lambda shapes: shapes[1] is None),
        ("are in the second alone", lambda shapes: shapes[0] is None),
        ("have other shapes", lambda shapes: None not in shapes),
    ):
        rest = [r for r in rows if r["relative"] is None and is_one(r["shapes"])]
        text += f", {len(rest):,} {words}" if rest else ""
    if not compared:
        return text
    shown = [["variable", "largest difference", "relative"]]
    shown += [
        [row["path"], f"{row['largest']:.3g}", f"{row['relative']:.3g}"]
        for row in compared[:most]
    ]
    more = f"\nand {len(compared) - most:,} more" if len(compared) > most else ""
    return f"{text}\n{aligned(shown)}{more}"


def _answers_in_words(answers: Mapping[str, Any], most: int) -> str:
    number, total = answers["num_differing"], answers["num_examples"]
    first, second = answers["top1"]
    lines = [
        f"top-1 {first:.2%} and {second:.2%}: {100 * answers['difference']:+.2f} "
        f"+-{100 * answers['margin_95']:.2f} points, 95% interval, paired",
        f"{number:,} of {total:,} answers differ ({number / total:.2%}); "
        f"{answers['only_first_right']:,} are right in the first alone, "
        f"{answers['only_second_right']:,} in the second alone",
    ]
    if answers["changes"]:
        rows = [["first", "second", "images"]]
        for change in answers["changes"][:most]:
            rows.append([change["first"], change["second"], f"{change['count']:,}"])
        lines.append(aligned(rows, left=2))
    return "\n".join(lines)
