"""From PyTorch weights through compression to a fine-tuned network, and its control."""

import dataclasses
import pathlib
from typing import Any

import jax
from flax import linen as nn

from inertia_jax import (
    CostTable,
    Plan,
    compress,
    load_torch,
    recalibrate_batch_norm,
    save_checkpoint,
)
from inertia_jax.metadata import Metadata
from train.augment import Augmentation
from train.calibration import training_inputs
from train.config import Config
from train.config_file import config_to_json
from train.data import ImageSet, load_data
from train.errors import UsageError, user_input
from train.evaluate import Evaluation
from train.evaluate_checkpoint import EvaluationSettings, evaluate_network
from train.keys import run_keys
from train.layer_report import parse_ranks
from train.loop import fit
from train.networks import (
    from_checkpoint,
    last_checkpoint,
    make_model,
    make_preprocessing,
    read_description,
    read_network,
)
from train.pipeline_config import Pipeline, check_claim, claim
from train.trainer import check_trainable


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage ended with.

    Attributes:
        name: The stage's name.
        evaluation: The network's answers to the test images.
        cost: The network's cost.
        plan: The network's plan.
    """

    name: str
    evaluation: Evaluation
    cost: CostTable
    plan: Plan


def run_pipeline(
    pipeline: Pipeline, *, weights: str | None, workdir: pathlib.Path
) -> list[Stage] | None:
    """Runs the stages that have not ended yet, and returns all of them.

    Args:
        pipeline: What to do.
        weights: PyTorch weights of the network; None where `workdir` has them already.
        workdir: Directory of everything; the same command again goes on.

    Returns:
        The stages; None if a signal stopped one, which the same command goes on with.

    Raises:
        UsageError: Bad input, or another pipeline in `workdir`.
    """
    check_claim(pipeline, weights, workdir)
    config = pipeline.run
    data = load_data(
        config.data.source,
        cache_dir=config.data.cache_dir,
        image_size=config.data.load_size,
    )
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
    if dense is None:
        return None
    stages = [_evaluated("head trained", dense, config)]
    teacher = str(dense.absolute()) if pipeline.distill else None
    before = dense
    for i, rule in enumerate(pipeline.ranks, start=1):
        out = workdir / f"compressed_{i}"
        if not out.is_dir():
            _compress(pipeline, rule, before, data, out)
        stages.append(_evaluated(f"compressed, {rule}", out, config))
        tuned = _train(_from(config, out, teacher), workdir / f"tuned_{i}")
        if tuned is None:
            return None
        stages.append(_evaluated(f"fine-tuned, {rule}", tuned, config))
        before = tuned
    if pipeline.control:
        before = dense
        # Its schedule starts anew as often as that of the compressed networks.
        for i in range(1, len(pipeline.ranks) + 1):
            control = _train(_from(config, before, None), workdir / f"control_{i}")
            if control is None:
                return None
            before = control
        stages.append(_evaluated("dense, fine-tuned as long", before, config))
    return stages


def _read_weights(
    pipeline: Pipeline, weights: str | None, data: ImageSet
) -> tuple[nn.Module, dict[str, Any], Metadata]:
    if weights is None:
        raise UsageError("`weights` must name a .pth, .pt or .safetensors file.")
    config = pipeline.run
    with user_input():
        model = make_model(config.model, num_classes=data.num_classes)
        preprocessing = make_preprocessing(config.data, data.image_shape)
        variables = load_torch(
            model,
            weights,
            reinitialise=(pipeline.head,),
            key=run_keys(config.seed).init,
            image_shape=preprocessing.image_shape,
        )
        info = {"imported_from": weights, "config": config_to_json(config)}
        return model, variables, Metadata(preprocessing, data.class_names, info)


def _train(config: Config, workdir: pathlib.Path) -> pathlib.Path | None:
    """Trains, or goes on; returns the last checkpoint, or None if it was stopped."""
    result = fit(config, workdir=workdir, resume=True)
    if result.stopped_by is not None:
        return None
    return last_checkpoint(workdir)


def _from(config: Config, checkpoint: pathlib.Path, teacher: str | None) -> Config:
    """Returns the configuration that trains a checkpoint's network further."""
    config = dataclasses.replace(config, name="tune", teacher=teacher)
    return from_checkpoint(config, read_description(checkpoint), keep_data=True)


def _compress(
    pipeline: Pipeline,
    rule: str,
    before: pathlib.Path,
    data: ImageSet,
    out: pathlib.Path,
) -> None:
    config = pipeline.run
    with user_input():
        network = read_network(before)
        preprocessing = network.preprocessing
        if data.train is None:
            raise ValueError("training has checked it.")
        model, variables = compress(
            network.model,
            network.variables,
            ranks=parse_ranks(rule),
            image_shape=preprocessing.image_shape,
        )
        if pipeline.recalibration_images:
            images = training_inputs(
                data.train,
                Augmentation.of(config.data, preprocessing, network.model.dtype),
                pipeline.recalibration_images,
                seed=config.seed,
            )
            variables = recalibrate_batch_norm(
                model, variables, images, batch_size=config.batch_size
            )
        info = {**network.info, "evaluation": None, "compressed": {"ranks": rule}}
        metadata = Metadata(preprocessing, network.class_names, info)
        save_checkpoint(out, model, variables, metadata=metadata)


def _evaluated(name: str, checkpoint: pathlib.Path, config: Config) -> Stage:
    network = read_network(checkpoint)
    settings = EvaluationSettings(config.data.cache_dir, config.eval_batch_size)
    evaluation = evaluate_network(network, settings, source=config.data.source)
    print(f"{name}: top-1 {evaluation.top1:.2%}", flush=True)
    return Stage(name, evaluation, network.cost(), network.model.plan)
