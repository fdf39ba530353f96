"""From PyTorch weights through compression to a fine-tuned network, and its control."""

import dataclasses
import pathlib
from typing import Any

import jax
from flax import linen as nn

from inertia_jax import (
    compress,
    count_cost,
    load_checkpoint,
    load_torch,
    recalibrate_batch_norm,
    save_checkpoint,
)
from inertia_jax.metadata import Metadata, load_metadata
from train.build import make_model, make_preprocessing
from train.calibration import training_inputs
from train.checkpoints import latest_steps
from train.config import Config
from train.config_file import config_to_json
from train.data import ImageSet, load_data
from train.errors import UsageError, user_input
from train.evaluate import Evaluation
from train.evaluate_checkpoint import evaluate_checkpoint
from train.keys import run_keys
from train.layer_report import parse_ranks
from train.loop import fit
from train.pipeline_config import Pipeline, check_claim, claim
from train.trainer import check_trainable


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage ended with.

    Attributes:
        name: Of the stage.
        checkpoint: Where the network lies.
        evaluation: Of the test images.
        params: Of the network.
        macs: Of the network, an image.
    """

    name: str
    checkpoint: pathlib.Path
    evaluation: Evaluation
    params: int
    macs: int


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
    checkpoints = workdir / "checkpoints"
    return checkpoints / f"step_{latest_steps(checkpoints)[-1]:08d}"


def _from(config: Config, checkpoint: pathlib.Path, teacher: str | None) -> Config:
    """Returns the configuration that trains a checkpoint's network further."""
    model, _ = load_checkpoint(checkpoint)
    return dataclasses.replace(
        config,
        name="tune",
        init=str(checkpoint.absolute()),
        teacher=teacher,
        model=dataclasses.replace(config.model, plan=model.plan.to_json()),
    )


def _compress(
    pipeline: Pipeline,
    rule: str,
    before: pathlib.Path,
    data: ImageSet,
    out: pathlib.Path,
) -> None:
    config = pipeline.run
    with user_input():
        model, variables = load_checkpoint(before)
        metadata = load_metadata(before)
        preprocessing = metadata.preprocessing
        if preprocessing is None or data.train is None:
            raise ValueError("training has checked both.")
        model, variables = compress(
            model,
            variables,
            ranks=parse_ranks(rule),
            image_shape=preprocessing.image_shape,
        )
        if pipeline.recalibration_images:
            images = training_inputs(
                data.train,
                preprocessing,
                pipeline.recalibration_images,
                seed=config.seed,
                dtype=model.dtype,
                crop_padding=config.data.crop_padding,
                flip=config.data.flip,
                resized_crop=config.data.resized_crop,
                crop_mode=config.data.crop_mode,
            )
            variables = recalibrate_batch_norm(
                model, variables, images, batch_size=config.batch_size
            )
        info = {**metadata.info, "evaluation": None, "compressed": {"ranks": rule}}
        metadata = Metadata(preprocessing, metadata.class_names, info)
        save_checkpoint(out, model, variables, metadata=metadata)


def _evaluated(name: str, checkpoint: pathlib.Path, config: Config) -> Stage:
    evaluation = evaluate_checkpoint(
        checkpoint,
        source=config.data.source,
        cache_dir=config.data.cache_dir,
        batch_size=config.eval_batch_size,
    )
    model, _ = load_checkpoint(checkpoint)
    preprocessing = load_metadata(checkpoint).preprocessing
    if preprocessing is None:
        raise ValueError("a run's checkpoints have a preprocessing.")
    cost = count_cost(model, preprocessing.image_shape)
    print(f"{name}: top-1 {evaluation.top1:.2%}", flush=True)
    return Stage(name, checkpoint, evaluation, cost.params, cost.macs)
