"""From PyTorch weights through compression to a fine-tuned network, and its control."""

import dataclasses
import json
import pathlib

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


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What happens to a network, one stage after another.

    New head, head alone trained; then compress and fine-tune, once a rule of `ranks`;
    and, as a control, the dense network fine-tuned as often for as long, from labels
    alone.
    """

    run: Config
    """Every stage's training; its epochs are those of each fine-tuning."""
    head: str = "fc"
    """Layer that is drawn anew for the data's classes."""
    head_epochs: int = 5
    """Epochs in which the head alone is trained."""
    ranks: tuple[str, ...] = ("ratio:0.2",)
    """Rules as `compress` takes them; of several, each starts from the one before."""
    recalibration_images: int = 0
    """Training images that recalibrate BatchNorm after compressing; 0: it is not."""
    distill: bool = False
    """Fine-tune with the network after head training as a teacher."""
    control: bool = True
    """Fine-tune the dense network, too."""

    def __post_init__(self) -> None:
        if self.head_epochs < 1:
            raise UsageError(f"`head_epochs` (={self.head_epochs}) must be >= 1.")
        if not self.ranks:
            raise UsageError("`ranks` must have at least one rule.")
        if self.recalibration_images < 0 or self.recalibration_images == 1:
            raise UsageError(
                f"`recalibration_images` (={self.recalibration_images}) must be 0 or "
                f">= 2."
            )
        for name in ("init", "teacher", "train_only"):
            if getattr(self.run, name):
                raise UsageError(
                    f"`run.{name}` (={getattr(self.run, name)}) must not be set: the "
                    f"stages set it themselves."
                )
        for rule in self.ranks:
            parse_ranks(rule)


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
    _claim(pipeline, workdir)
    config = pipeline.run
    data = load_data(
        config.data.source,
        cache_dir=config.data.cache_dir,
        image_size=config.data.load_size,
    )
    imported = workdir / "imported"
    if not imported.is_dir():
        _import(pipeline, weights, data, imported)
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


def _claim(pipeline: Pipeline, workdir: pathlib.Path) -> None:
    """Notes what runs here, or checks that it is the same."""
    file = workdir / "pipeline.json"
    said = {**dataclasses.asdict(pipeline), "run": config_to_json(pipeline.run)}
    said = json.loads(json.dumps(said))
    if file.is_file():
        if json.loads(file.read_text()) != said:
            raise UsageError(
                f"{workdir} holds a pipeline with other settings; nothing was changed. "
                f"Give another --workdir."
            )
        return
    with user_input():
        workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said, indent=1) + "\n")


def _import(
    pipeline: Pipeline, weights: str | None, data: ImageSet, out: pathlib.Path
) -> None:
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
        metadata = Metadata(preprocessing, data.class_names, info)
        save_checkpoint(out, model, variables, metadata=metadata)


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
