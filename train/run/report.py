"""A run's record and its learning curve."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from inertia_jax.atomic import appearing
from inertia_jax.cost.table import aligned
from train.errors import UsageError, user_input
from train.run.directory import read_json
from train.run.lines import is_number, read_metrics, read_starts


def make_record(
    run: pathlib.Path, *, seconds_to: Sequence[float] = ()
) -> dict[str, Any]:
    """Returns a run's configuration, machine and curve, one row an epoch.

    Args:
        run: The run's directory.
        seconds_to: Accuracies in (0, 1]; the record says when each was reached.

    Raises:
        UsageError: There is no run at `run`, none of its epochs has ended, or an
            accuracy is not in (0, 1].
    """
    for accuracy in seconds_to:
        if not 0 < accuracy <= 1:
            raise UsageError(f"`seconds_to` (={accuracy}) must be in (0, 1].")
    if not (run / "config.json").is_file():
        raise UsageError(f"there is no run at {run}.")
    config = read_json(run / "config.json")
    if not (isinstance(config, dict) and isinstance(config.get("name"), str)):
        raise UsageError(f"{run / 'config.json'} holds no configuration of a run.")
    starts = read_starts(run / "run.jsonl")
    lines = read_metrics(run / "metrics.jsonl")
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    tests = {line["epoch"]: line for line in lines if line["kind"] == "test"}
    validations = {x["epoch"]: x for x in lines if x["kind"] == "validation"}
    curve = [
        {
            "epoch": epoch,
            "step": tests[epoch]["step"],
            "train_loss": epochs[epoch]["loss"],
            "train_accuracy": epochs[epoch]["accuracy"],
            "test_loss": tests[epoch]["loss"],
            "test_top1": tests[epoch]["top1"],
            "test_top5": tests[epoch]["top5"],
            **{
                f"validation_{name}": validations[epoch][name]
                for name in ("loss", "top1", "top5")
                if epoch in validations
            },
            "images_per_s": epochs[epoch]["images_per_s"],
            "train_seconds": _number_or_none(epochs[epoch].get("train_seconds")),
            **_gate_rates(epochs[epoch], tests[epoch]),
        }
        for epoch in sorted(set(epochs) & set(tests))
    ]
    if not curve:
        raise UsageError(f"{run / 'metrics.jsonl'} has no epoch that ended.")
    for before, row in itertools.pairwise(curve):
        if before["train_seconds"] is None:  # an older version did not count them
            row["train_seconds"] = None
    reached = {str(share): _first_epoch(curve, share) for share in seconds_to}
    found = {"seconds_to": reached} if seconds_to else {}
    return {"config": config, "starts": starts, "curve": curve, **found}


def _gate_rates(epoch: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """Returns the gate rates of an epoch: the mean in training, each layer's in test.

    It is {} for a network without gates.
    """
    rates = {
        name.removeprefix("gate_rate/"): rate
        for name, rate in test.items()
        if name.startswith("gate_rate/") and is_number(rate)
    }
    mean = _number_or_none(epoch.get("gate_rate"))
    return {"train_gate_rate": mean, "test_gate_rates": rates} if rates else {}


def _number_or_none(value: Any) -> Any:
    return value if is_number(value) else None


def _first_epoch(curve: list[dict[str, Any]], accuracy: float) -> dict[str, Any] | None:
    for row in curve:
        if row["test_top1"] >= accuracy:
            return {name: row[name] for name in ("epoch", "train_seconds")}
    return None


def draw_curve(record: dict[str, Any], path: pathlib.Path) -> None:
    """Draws accuracy and loss over epochs into a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = record["curve"]
    epochs = [row["epoch"] for row in curve]
    # A line through one point is not seen.
    marker = "o" if len(epochs) == 1 else None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    splits = [("train", "accuracy"), ("test", "top1")]
    if is_validated(curve):
        splits.append(("validation", "top1"))
    for split, name in splits:
        shares = [100 * row[f"{split}_{name}"] for row in curve]
        left.plot(epochs, shares, label=split, marker=marker)
        losses = [row[f"{split}_loss"] for row in curve]
        right.plot(epochs, losses, label=split, marker=marker)
    left.set(xlabel="epoch", ylabel="accuracy [%]")
    right.set(xlabel="epoch", ylabel="loss [nats]")
    left.legend()
    figure.suptitle(record["config"]["name"])
    figure.tight_layout()
    with user_input(), appearing(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:])
    pyplot.close(figure)


def is_validated(curve: Sequence[dict[str, Any]]) -> bool:
    """Whether validation images were held out, which then choose the checkpoint."""
    return all("validation_top1" in row for row in curve)


def format_curve(record: dict[str, Any]) -> str:
    """Returns the curve as a table, and which epoch's checkpoint is the best."""
    curve = record["curve"]
    judge = "validation" if is_validated(curve) else "test"
    columns = {
        "epoch": ("epoch", "d"),
        "train loss": ("train_loss", ".4f"),
        "train acc": ("train_accuracy", ".2%"),
        "test loss": ("test_loss", ".4f"),
        "test top-1": ("test_top1", ".2%"),
        "images/s": ("images_per_s", ".0f"),
    }
    if judge == "validation":
        columns["validation top-1"] = ("validation_top1", ".2%")
    rows = [[format(row[key], form) for key, form in columns.values()] for row in curve]
    highest = max(row[f"{judge}_top1"] for row in curve)
    first, *equal = [row for row in curve if row[f"{judge}_top1"] == highest]
    tie = f", the first of {1 + len(equal)} with this accuracy" if equal else ""
    best = f"best: epoch {first['epoch']}, {judge} top-1 {highest:.2%}{tie}"
    if judge == "validation":
        best += f"; test top-1 {first['test_top1']:.2%}"
    reached = [
        f"{float(share):.2%} {in_words(epoch)}"
        for share, epoch in record.get("seconds_to", {}).items()
    ]
    return "\n".join([aligned([list(columns), *rows], left=0), best, *reached])


def in_words(reached: dict[str, Any] | None) -> str:
    """Returns when an accuracy was reached, as a record has it."""
    if reached is None:
        return "was not reached"
    seconds = reached["train_seconds"]
    after = "unknown seconds" if seconds is None else f"{seconds:.1f} s"
    return (
        f"after epoch {reached['epoch']}, {after} of training alone: without "
        f"compiling and evaluating"
    )
