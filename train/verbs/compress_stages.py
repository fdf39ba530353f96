"""What `python -m train compress` does to a network, stage after stage."""

import dataclasses
from collections.abc import Callable
from typing import Any

from inertia_jax import (
    Budget,
    compress,
    make_inertial,
    recalibrate_batch_norm,
    reconstruct,
)
from train.augment import Augmentation
from train.calibration import training_inputs
from train.config import Data
from train.data import load_data
from train.errors import UsageError
from train.layer_report import parse_ranks
from train.networks import NetworkDescription
from train.stages import Network
from train.verbs.compress_options import Compress

# Augmentation that is assumed of the training of imported weights.
IMPORTED = Data(source="", crop_padding=0, flip=False)


def drawer(
    args: Compress, source: str | None, network: NetworkDescription
) -> Callable[..., Any] | None:
    """Returns a function that draws training images; None if no data are known."""
    if source is None:
        return None
    preprocessing = network.preprocessing
    size = max(preprocessing.image_shape[0], preprocessing.resize or 0)
    data = load_data(source, cache_dir=args.cache_dir, image_size=size)
    if data.train is None:
        raise UsageError(f"{data.name} has no training images to calibrate on.")
    split = data.train
    as_trained = dataclasses.replace(
        network.trained_on or IMPORTED,
        crop_padding=args.crop_padding or 0,
        flip=bool(args.flip),
    )
    form = (network.preprocessing, network.model.dtype)
    plain, augmented = Augmentation.plain(*form), Augmentation.of(as_trained, *form)

    def draw(count: int, *, augment: bool) -> Any:
        return training_inputs(
            split, augmented if augment else plain, count, seed=args.seed
        )

    return draw


def compressed_stages(
    args: Compress,
    dense: Network,
    draw: Callable[..., Any] | None,
    image_shape: tuple[int, int, int],
) -> dict[str, Network]:
    """Returns the network after each stage, by name: the last is the one to keep.

    Args:
        args: Checked.
        dense: The network as it was.
        draw: Of `drawer`.
        image_shape: [h, w, c].
    """
    if args.macs is None:
        stages = _make_tucker2(args, dense, draw, image_shape)
    else:
        stages = {"inertial": _make_inertial(args, dense, draw)}
    if draw is not None and args.reconstruction_images:
        model, variables = next(reversed(stages.values()))
        variables = reconstruct(
            model,
            variables,
            dense=dense,
            images=draw(args.reconstruction_images, augment=True),
            layers=args.layers,
        )
        stages["reconstructed"] = _recalibrated(args, (model, variables), draw)
    return stages


def _make_inertial(
    args: Compress, dense: Network, draw: Callable[..., Any] | None
) -> Network:
    if draw is None or args.macs is None:
        raise ValueError("checked by the caller.")
    return make_inertial(
        *dense,
        macs=args.macs,
        calibration=draw(args.calibration_images, augment=False),
        recalibration=draw(args.recalibration_images, augment=True),
        layers=args.layers,
        tile_size=args.tile_size,
        metric=args.metric,
        reference=args.reference,
        low=args.low,
        channel_stride=args.channel_stride,
    )


def _make_tucker2(
    args: Compress,
    dense: Network,
    draw: Callable[..., Any] | None,
    image_shape: tuple[int, int, int],
) -> dict[str, Network]:
    """Returns the compressed network as it comes, and recalibrated if it can be."""
    rule = parse_ranks(args.ranks or "")
    if isinstance(rule, Budget) and rule.of == "latency" and args.latency_batch:
        rule = dataclasses.replace(rule, batch_size=args.latency_batch)
    calibration = None
    if args.weigh and draw is not None:
        calibration = draw(args.calibration_images, augment=False)
    raw = compress(
        *dense,
        ranks=rule,
        method="hooi" if args.method == "hooi" else "hosvd",
        calibration=calibration,
        layers=args.layers,
        keep_stem=args.keep_stem,
        round_to=args.round_to,
        image_shape=image_shape,
    )
    recalibrated = raw if draw is None else _recalibrated(args, raw, draw)
    if recalibrated is raw:
        return {"raw": raw}
    return {"raw": raw, "recalibrated": recalibrated}


def _recalibrated(
    args: Compress, network: Network, draw: Callable[..., Any]
) -> Network:
    """Returns a network with statistics of training images, thresholds as they are."""
    model, variables = network
    if not args.recalibration_images or "batch_stats" not in variables:
        return network
    still = model.clone(plan=model.plan.with_fixed_thresholds())
    images = draw(args.recalibration_images, augment=True)
    return model, recalibrate_batch_norm(still, variables, images)
