"""Sweeps: many runs, each of which appends a record to one file when it ends."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from inertia_jax.cost.table import aligned
from train.config import Config
from train.config_file import (
    config_to_json,
    fill_defaults,
    load_from_file,
    without_places,
)
from train.errors import UsageError, user_input
from train.evaluate.evaluation import Evaluation
from train.networks import cost_to_json, read_description
from train.run.checkpoints import last_checkpoint
from train.run.lines import append, parsed
from train.run.report import make_record


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Configurations by name, each run with every seed.

    Attributes:
        configs: The configurations, whose names stand in the records.
        seeds: The seeds. Every configuration runs with the first seed before any runs
            with the second.
    """

    configs: tuple[Config, ...]
    seeds: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        names = [config.name for config in self.configs]
        if len(set(names)) != len(names):
            raise UsageError(f"`configs` have names {names}; must differ.")

    def runs(self) -> Iterator[Config]:
        """Yields every run's configuration."""
        for seed in self.seeds:
            for config in self.configs:
                yield dataclasses.replace(config, seed=seed)


def load_sweep(path: pathlib.Path) -> Sweep:
    """Reads the `sweep` of a Python file.

    Raises:
        UsageError: The file is missing, fails, or defines no Sweep.
    """
    return load_from_file(path, "sweep", Sweep)


def with_source(config: Config, source: str | None) -> Config:
    """Returns a configuration with another data source; None keeps its own."""
    if source is None:
        return config
    data = dataclasses.replace(config.data, source=source)
    return dataclasses.replace(config, data=data)


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a file, without a last line that a kill left unfinished.

    Raises:
        UsageError: The file holds something other than records.
    """
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], int] = {}
    with user_input():
        lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        record = parsed(line)
        if record is None and line.startswith("{") and not line.endswith("\n"):
            continue
        if record is None or not {"name", "seed", "config"} <= set(record):
            raise UsageError(f"{path}, line {number}, holds no record of a sweep.")
        run = str(record["name"]), str(record["seed"])
        if run in runs:
            raise UsageError(
                f"{path} holds two records of {run[0]}, seed {run[1]}, in lines "
                f"{runs[run]} and {number}; take one out."
            )
        runs[run] = number
        records.append(record)
    return records


def append_record(
    path: pathlib.Path, record: dict[str, Any], *, workdir: pathlib.Path
) -> None:
    """Adds a record, after cutting off a line that a kill left unfinished.

    A record of the same run, which another sweep has added meanwhile, is kept.

    Args:
        path: The file of records.
        record: The record.
        workdir: The directory of the record's run, for the error.

    Raises:
        UsageError: The other record has another configuration.
    """
    content = json.dumps(record).encode() + b"\n"
    with path.open("ab") as lock:
        # A file system may have no locks; then two sweeps are on their own.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        run = (record["name"], record["seed"])
        for other in read_records(path):
            if (other["name"], other["seed"]) != run:
                continue
            if not _is_same(other["config"], record["config"]):
                raise UsageError(
                    f"{path} has a record of {run[0]}, seed {run[1]}, with another "
                    f"configuration, by another sweep; this one is not added. Its run "
                    f"is kept in {workdir}: the same command with another --out adds "
                    f"it there."
                )
            print(
                f"warning: {path} has a record of {run[0]}, seed {run[1]}, by another "
                f"sweep; it is kept, and this one is not added.",
                file=sys.stderr,
            )
            return
        text = path.read_bytes()
        start = text.rfind(b"\n") + 1
        last = text[start:]
        if last and parsed(last) is None:
            os.truncate(path, start)
        elif last:
            content = b"\n" + content
        append(path, content)


def find_record(
    records: list[dict[str, Any]], config: Config
) -> Mapping[str, Any] | None:
    """Returns the record of a run.

    Raises:
        UsageError: The record of that name and seed has another configuration.
    """
    for record in records:
        if (record["name"], record["seed"]) == (config.name, config.seed):
            if not _is_same(record["config"], config_to_json(config)):
                raise UsageError(
                    f"the record of {config.name}, seed {config.seed}, has another "
                    f"configuration; take it out, or name the run anew."
                )
            return record
    return None


def _is_same(a: Any, b: Any) -> bool:
    """Returns whether two JSON configs are equal, wherever their data are."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    defaults = config_to_json(Config())
    a, b = (without_places(fill_defaults(config, defaults)) for config in (a, b))
    return bool(a == b)


def make_sweep_record(
    config: Config, workdir: pathlib.Path, evaluation: Evaluation
) -> dict[str, Any]:
    """Returns the record of a run that ended with this evaluation."""
    record = make_record(workdir)
    cost = read_description(last_checkpoint(workdir)).cost(evaluation.gate_rates)
    rates = [row["images_per_s"] for row in record["curve"][1:]]
    return {
        "name": config.name,
        "seed": config.seed,
        "top1": evaluation.top1,
        "loss": evaluation.loss,
        "num_examples": evaluation.num_examples,
        "gate_rates": dict(evaluation.gate_rates),
        "cost": cost_to_json(cost),
        "train_images_per_s": statistics.median(rates) if rates else None,
        "test_top1_by_epoch": [row["test_top1"] for row in record["curve"]],
        "train_seconds_by_epoch": [row["train_seconds"] for row in record["curve"]],
        "config": config_to_json(config),
        "started": record["starts"],
    }


def make_failed_record(config: Config, error: Exception) -> dict[str, Any]:
    """Returns the record of a run that diverged, and would diverge again."""
    return {
        "name": config.name,
        "seed": config.seed,
        "failed": str(error),
        "config": config_to_json(config),
    }


def summarise(records: list[dict[str, Any]]) -> str:
    """Returns a table of means and spreads over seeds, with a row for each name."""
    lines = [["run", "seeds", "top-1 mean", "std", "MACs in all", "params"]]
    ended = [record for record in records if "failed" not in record]
    for name in dict.fromkeys(record["name"] for record in ended):
        mine = [record for record in ended if record["name"] == name]
        top1 = [100 * record["top1"] for record in mine]
        spread = statistics.stdev(top1) if len(top1) > 1 else float("nan")
        macs = statistics.mean(record["cost"]["total_macs"] for record in mine)
        mean, params = statistics.mean(top1), mine[0]["cost"]["params"]
        numbers = [f"{mean:.2f}%", f"{spread:.2f}", f"{macs:,.0f}", f"{params:,}"]
        lines.append([name, str(len(mine)), *numbers])
    failed = [
        f"{record['name']}, seed {record['seed']}, failed: {record['failed']}"
        for record in records
        if "failed" in record
    ]
    return "\n".join([aligned(lines), *failed])
