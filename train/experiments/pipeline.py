"""Pipelines from PyTorch weights to a compressed, fine-tuned network."""

import dataclasses
import pathlib
from typing import Any

import jax
from flax import linen as nn

from inertia_jax import CostTable, Plan, save_checkpoint
from inertia_jax.cost.table import aligned
from inertia_jax.interop import read_torch
from inertia_jax.metadata import Metadata
from train.compress.options import Compress
from train.compress.progress import shown_progress
from train.compress.rank_rules import plan_to_json
from train.compress.stages import compressed_stages, save_compressed
from train.config import Config
from train.config_file import config_to_json, without_places
from train.data import ImageSet, load_configured
from train.errors import UsageError, user_input
from train.evaluate.checkpoint import evaluate_network
from train.evaluate.evaluation import Evaluation, paired_difference
from train.evaluate.settings import EvaluationSettings
from train.experiments.claim import check_claim, claim
from train.experiments.pipeline_config import Pipeline
from train.fit.checks import check_trainable
from train.fit.loop import FitResult, fit
from train.keys import run_keys
from train.networks import (
    from_checkpoint,
    make_model,
    make_preprocessing,
    read_description,
    read_network,
)
from train.run.checkpoints import last_checkpoint
from train.run.directory import describe_machine


@dataclasses.dataclass(frozen=True)
class Stage:
    """The accuracy, cost and plan of the network that a stage ended with."""

    name: str
    evaluation: Evaluation
    cost: CostTable
    plan: Plan


class StoppedError(Exception):
    """A signal stopped a training; `result` is how it ended."""

    def __init__(self, result: FitResult) -> None:
        """Holds the end of the training."""
        super().__init__(f"stopped in {result.workdir}")
        self.result = result


def run_pipeline(
    pipeline: Pipeline, *, weights: str | None, workdir: pathlib.Path
) -> list[Stage]:
    """Runs the stages that have not ended yet, and returns all of them.

    Args:
        pipeline: The pipeline.
        weights: The PyTorch weights of the network; None where `workdir` already has
            the imported network.
        workdir: The directory of all stages, in which the same call goes on.

    Raises:
        StoppedError: A signal stopped a training; the same call goes on with it.
        UsageError: The input is bad, or `workdir` holds another pipeline.
    """
    check_claim(pipeline, weights, workdir)
    config = pipeline.run
    data = load_configured(config.data)
    imported = workdir / "imported"
    if not imported.is_dir():
        network = _read_weights(pipeline, weights, data)
        check_trainable(config, data, jax.device_count())
        claim(pipeline, weights, workdir)
        with user_input():
            save_checkpoint(imported, *network[:2], metadata=network[2])
    head_config = dataclasses.replace(
        config,
        name="head",
        epochs=pipeline.head_epochs,
        train_only=(pipeline.head,),
        init=str(imported.absolute()),
    )
    dense = _train(head_config, workdir / "head")
    stages = [_evaluated("head trained", dense, config)]
    teacher = str(dense.absolute()) if pipeline.distill else None
    before = dense
    for i, rule in enumerate(pipeline.ranks, start=1):
        out = workdir / f"compressed_{i}"
        if not out.is_dir():
            _compress(pipeline, rule, before, data, out)
        stages.append(_evaluated(f"compressed, {rule}", out, config))
        tuned = _tune(config, out, teacher, workdir / f"tuned_{i}")
        stages.append(_evaluated(f"fine-tuned, {rule}", tuned, config))
        before = tuned
    if pipeline.control:
        before = dense
        # The control's schedule restarts as often as that of the compressed networks.
        for i in range(1, len(pipeline.ranks) + 1):
            before = _tune(config, before, None, workdir / f"control_{i}")
        stages.append(_evaluated("dense, fine-tuned as long", before, config))
    return stages


def _read_weights(
    pipeline: Pipeline, weights: str | None, data: ImageSet
) -> tuple[nn.Module, dict[str, Any], Metadata]:
    if weights is None:
        raise UsageError("`weights` must name a file of torch.save or safetensors.")
    config = pipeline.run
    with user_input():
        model = make_model(config.model, num_classes=data.num_classes)
        preprocessing = make_preprocessing(config.data, data.image_shape)
        variables, note = read_torch(
            model,
            weights,
            reinitialise=(pipeline.head,),
            key=run_keys(config.seed).init,
            image_shape=preprocessing.image_shape,
        )
        if note:
            print(f"{note}.")
        info = {"imported_from": weights, "config": config_to_json(config)}
        return model, variables, Metadata(preprocessing, data.class_names, info)


def _train(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Trains or resumes a run, and returns its last checkpoint."""
    result = fit(config, workdir=workdir, resume=True)
    if result.stopped_by is not None:
        raise StoppedError(result)
    return last_checkpoint(workdir)


def _tune(
    config: Config, checkpoint: pathlib.Path, teacher: str | None, workdir: pathlib.Path
) -> pathlib.Path:
    """Trains a checkpoint's network further, as `_train` does."""
    config = dataclasses.replace(config, name="tune", teacher=teacher)
    network = read_description(checkpoint)
    return _train(from_checkpoint(config, network, keep_data=True), workdir)


def _compress(
    pipeline: Pipeline,
    rule: str,
    before: pathlib.Path,
    data: ImageSet,
    out: pathlib.Path,
) -> None:
    """Compresses as the verb `compress` does, with errors that are not weighed."""
    config = pipeline.run
    args = Compress(
        checkpoint=str(before),
        out=str(out),
        ranks=rule,
        weigh=False,
        recalibration_images=pipeline.recalibration_images,
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
        seed=config.seed,
    )
    network = read_network(before)
    with user_input(), shown_progress() as progress:
        stages = compressed_stages(
            args,
            network,
            data.train,
            batch_size=config.batch_size,
            progress=progress,
        )
    save_compressed(args, network, next(reversed(stages.values())))


def _evaluated(name: str, checkpoint: pathlib.Path, config: Config) -> Stage:
    network = read_network(checkpoint)
    settings = EvaluationSettings(
        config.data.cache_dir, config.eval_batch_size, flip_test=config.flip_test
    )
    evaluation = evaluate_network(network, settings, source=config.data.source)
    print(f"{name}: top-1 {evaluation.top1:.2%}", flush=True)
    cost = network.cost(evaluation.gate_rates)
    return Stage(name, evaluation, cost, network.model.plan)


def make_pipeline_record(pipeline: Pipeline, stages: list[Stage]) -> dict[str, Any]:
    """Returns the record of all stages as a JSON value."""
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
                "macs": stage.cost.total_macs,
                "plan": plan_to_json(stage.plan),
            }
        )
    config = without_places(config_to_json(pipeline.run))
    return {
        "machine": describe_machine(),
        "backend": jax.default_backend(),
        "pipeline": {**dataclasses.asdict(pipeline), "run": config},
        "stages": rows,
    }


def summarise(stages: list[Stage]) -> str:
    """Returns the stages as a table."""
    rows = [
        [
            stage.name,
            f"{stage.evaluation.top1:.2%}",
            f"{stage.cost.params:,}",
            f"{stage.cost.total_macs:,}",
        ]
        for stage in stages
    ]
    return aligned([["stage", "top-1", "parameters", "MACs"], *rows])
