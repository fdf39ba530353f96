"""What the stages of a pipeline found, as a table and as JSON."""

import dataclasses
import pathlib
from typing import Any

import jax

from inertia_jax.cost_table import aligned
from train.config_file import config_to_json
from train.evaluate import paired_difference
from train.layer_report import plan_to_json
from train.pipeline import Stage
from train.pipeline_config import Pipeline
from train.rundir import describe_machine


def make_pipeline_record(pipeline: Pipeline, stages: list[Stage]) -> dict[str, Any]:
    """Returns what the stages found, as JSON."""
    first = stages[0].evaluation
    rows = []
    for stage in stages:
        difference, margin = paired_difference(first, stage.evaluation)
        rows.append(
            {
                "name": stage.name,
                "top1": stage.evaluation.top1,
                "top5": stage.evaluation.top5,
                "loss": stage.evaluation.loss,
                "num_examples": stage.evaluation.num_examples,
                "difference": difference,
                "margin_95": margin,
                "params": stage.cost.params,
                "macs": stage.cost.macs,
                "plan": plan_to_json(stage.plan),
            }
        )
    config = config_to_json(pipeline.run)
    # Where data lie on this machine is no part of what was run.
    config["data"]["source"] = pathlib.PurePath(config["data"]["source"]).name
    config["data"]["cache_dir"] = ""
    return {
        "machine": describe_machine(),
        "backend": jax.default_backend(),
        "pipeline": {**dataclasses.asdict(pipeline), "run": config},
        "stages": rows,
    }


def summarise(stages: list[Stage]) -> str:
    """Returns the stages as a table."""
    lines = [["stage", "top-1", "parameters", "MACs"]]
    for stage in stages:
        top1 = f"{stage.evaluation.top1:.2%}"
        lines.append(
            [stage.name, top1, f"{stage.cost.params:,}", f"{stage.cost.macs:,}"]
        )
    return aligned(lines)
