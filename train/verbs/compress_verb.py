"""`python -m train compress`: make a trained checkpoint smaller, without training."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from inertia_jax import load_checkpoint, make_inertial, save_checkpoint
from inertia_jax.checkpoint import Metadata, Preprocessing, load_metadata
from inertia_jax.plan import Inertial
from train.augment import Augmentation, example_keys
from train.checkpoints import find_checkpoint
from train.config import Data
from train.data import Split, load_data
from train.errors import UsageError, user_input
from train.evaluate import paired_difference
from train.rundir import describe_machine
from train.verbs.evaluate_verb import cost_at_rates, evaluate_checkpoint


@dataclasses.dataclass(frozen=True)
class Compress:
    """Makes a trained network's convolutions inertial, in tiles, without training it.

    Thresholds are chosen layer by layer on training images for a budget of MACs, and
    BatchNorm is recalibrated on them; the test images are evaluated before and after.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run, whose best is taken."""
    out: str
    """Directory of the new checkpoint; must not exist."""
    macs: float
    """Share of the network's MACs to keep, friction counted, in (0, 1]."""
    method: Literal["inertial"] = "inertial"
    """What the convolutions become."""
    layers: str = "*"
    """Glob over the paths of the convolutions that may change."""
    tile_size: int = 2
    """Side of a tile of outputs."""
    metric: Literal["l1", "l2", "max"] = Inertial.metric  # type: ignore[assignment]
    """Of friction."""
    reference: Literal["center", "core_mean"] = Inertial.reference
    """Of friction."""
    low: Literal["mean", "sample"] = Inertial.low
    """What fills a tile of low friction."""
    channel_stride: int = Inertial.channel_stride
    """Take friction on every so many channels."""
    data: str | None = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: what it was trained on."""
    cache_dir: str = Data.cache_dir
    """Where decoded sets are kept."""
    calibration_images: int = 512
    """Training images that choose the thresholds, as evaluation would see them."""
    recalibration_images: int = 4096
    """Training images that recalibrate BatchNorm, cropped and flipped as they were."""
    crop_padding: int | None = None
    """Of the training that made the checkpoint; None: as it says, 0 if imported."""
    flip: bool | None = None
    """Likewise."""
    also_test: tuple[str, ...] = ()
    """Further data whose test images are evaluated before and after."""
    record: str | None = None
    """Write what was found to this file, as JSON."""
    seed: int = 1
    """Of the choice of images and their crops."""


def run(argv: Sequence[str]) -> int:
    """Compresses as the arguments say, and prints cost and accuracy."""
    args = tyro.cli(Compress, args=argv, prog="python -m train compress")
    path, out = find_checkpoint(args.checkpoint), pathlib.Path(args.out)
    if out.exists():
        raise UsageError(f"`out` (={out}) must not exist; nothing was changed.")
    with user_input():
        model, variables = load_checkpoint(path)
        metadata = load_metadata(path)
    trained = metadata.info.get("config", {}).get("data", {})
    source = args.data or trained.get("source")
    preprocessing = metadata.preprocessing
    if source is None or preprocessing is None:
        raise UsageError(f"{path} names no data; say which with --data.")
    size = max(preprocessing.image_shape[0], preprocessing.resize or 0)
    data = load_data(source, cache_dir=args.cache_dir, image_size=size)
    if data.train is None:
        raise UsageError(f"{data.name} has no training images to calibrate on.")
    sources = (source, *args.also_test)
    before = [
        evaluate_checkpoint(path, source=test, cache_dir=args.cache_dir)
        for test in sources
    ]
    draw = functools.partial(
        training_inputs, data.train, preprocessing, seed=args.seed, dtype=model.dtype
    )
    seen_in_training = draw(
        args.recalibration_images,
        crop_padding=_or(args.crop_padding, trained.get("crop_padding", 0)),
        flip=_or(args.flip, trained.get("flip", False)),
        resized_crop=trained.get("resized_crop", False),
    )
    start = time.perf_counter()
    with user_input():
        model, variables = make_inertial(
            model,
            variables,
            macs=args.macs,
            calibration=draw(args.calibration_images),
            recalibration=seen_in_training,
            layers=args.layers,
            tile_size=args.tile_size,
            metric=args.metric,
            reference=args.reference,
            low=args.low,
            channel_stride=args.channel_stride,
        )
    seconds = time.perf_counter() - start
    info = {
        **metadata.info,
        "evaluation": None,  # was the dense network's
        "compressed": dataclasses.asdict(args),
    }
    metadata = Metadata(preprocessing, metadata.class_names, info)
    with user_input():
        save_checkpoint(out, model, variables, metadata=metadata)
    after = [
        evaluate_checkpoint(out, source=test, cache_dir=args.cache_dir)
        for test in sources
    ]
    cost = cost_at_rates(out, after[0].gate_rates)
    print(cost)
    tests: list[dict[str, Any]] = []
    for test, old, new in zip(sources, before, after, strict=True):
        difference, margin = paired_difference(old, new)
        print(
            f"{test}: top-1 {old.top1:.2%} before, {new.top1:.2%} after, "
            f"{100 * difference:+.2f} points (95% interval +-{100 * margin:.2f}, "
            f"paired, {old.num_examples:,} images)"
        )
        tests.append(
            {
                "data": pathlib.PurePath(test).name,
                "num_examples": old.num_examples,
                "top1_before": old.top1,
                "top1_after": new.top1,
                "difference": difference,
                "margin_95": margin,
                "gate_rates": dict(new.gate_rates),
            }
        )
    print(f"took {seconds:.0f} s; checkpoint {out}")
    if args.record is not None:
        record = {
            "machine": describe_machine(),
            "seconds": seconds,
            "dense_macs": cost.dense_macs,
            "macs": cost.macs,
            "ladder_macs": cost.ladder_macs,
            "other_ops": cost.other_ops,
            "total_macs": cost.total_macs,
            "tests": tests,
            "plan": json.loads(model.plan.to_json()),
        }
        with user_input():
            pathlib.Path(args.record).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def training_inputs(
    split: Split,
    preprocessing: Preprocessing,
    count: int,
    *,
    seed: int,
    dtype: Any,
    crop_padding: int = 0,
    flip: bool = False,
    resized_crop: bool = False,
) -> np.ndarray:
    """Returns some training images as the network sees them, plain if not said.

    Args:
        split: The training images.
        preprocessing: Of the network.
        count: So many, drawn without repetition; all, if there are fewer.
        seed: Of the draw and of the augmentation.
        dtype: Of the network's computation.
        crop_padding: See `train.config.Data`.
        flip: Likewise.
        resized_crop: Likewise.
    """
    if count < 2:
        raise UsageError(
            f"`calibration_images` and `recalibration_images` (={count}) must be >= 2."
        )
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]
    augmentation = Augmentation(
        preprocessing,
        crop_padding=crop_padding,
        flip=flip,
        resized_crop=resized_crop,
        dtype=jnp.dtype(dtype),
    )
    draw = jax.jit(augmentation.for_training)
    keys = example_keys(jax.random.key(seed), jnp.arange(len(chosen)))
    images = np.asarray(split.images[np.sort(chosen)])
    return np.concatenate(
        [
            np.asarray(draw(images[i : i + 256], keys[i : i + 256]))
            for i in range(0, len(images), 256)
        ]
    )
