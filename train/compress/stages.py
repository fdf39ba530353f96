"""The stages in which `python -m train compress` changes a network."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from inertia_jax import (
    Budget,
    compress,
    make_inertial,
    recalibrate_batch_norm,
    reconstruct,
    save_checkpoint,
)
from inertia_jax.calls import Network, takes_train
from inertia_jax.compression.recalibrate import running_statistics
from inertia_jax.progress import Progress
from train.compress.augmentation import needed_augmentation
from train.compress.options import Compress
from train.compress.rank_rules import parse_ranks
from train.config_file import differing_fields
from train.data import Split, load_data
from train.data.augment import Augmentation
from train.data.held_out import check_as_trained
from train.data.training_inputs import training_inputs
from train.errors import UsageError, user_input
from train.machine.processes import say
from train.machine.waiting import waiting
from train.networks import NetworkDescription, TrainedNetwork, read_network


def load_training_images(args: Compress, network: NetworkDescription) -> Split | None:
    """Returns the training images; None if no data are known.

    None of them was held out when the network was trained.

    Raises:
        UsageError: The data cannot be read, or have no training images.
    """
    if args.data is None:
        return None
    size = network.preprocessing.resized_sides
    data = load_data(
        args.data,
        cache_dir=args.cache_dir or network.cache_dir,
        image_size=size,
        held_out=network.held_out_of(args.data),
    )
    check_as_trained(data.name, data.held_out, network.info)
    if data.train is None:
        raise UsageError(f"{data.name} has no training images to calibrate on.")
    return data.train


def compressed_stages(
    args: Compress,
    network: TrainedNetwork,
    split: Split | None,
    *,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> dict[str, Network]:
    """Returns the network after each stage, by name; the last one is the result.

    Args:
        args: The options, checked and complete.
        network: The network as it was.
        split: The training images; None where no data are known.
        batch_size: The number of images a batch when BatchNorm is recalibrated.
        progress: A function that is told how many layers are done.

    Raises:
        ValueError: The options do not fit the network.
    """
    dense = (network.model, network.variables)
    if split is None:
        return {"raw": _make_tucker2(args, network, None, progress)}
    draw = _drawer(args, split, network)
    recalibrate = functools.partial(
        _recalibrated, args, draw=draw, batch_size=batch_size
    )
    stages: dict[str, Network] = {}
    what = "thresholds" if args.is_inertial else "ranks and factors"
    say(f"choosing {what}, which may take minutes")
    if args.is_inertial:
        recalibration = None
        if running_statistics(network.variables):
            recalibration = draw(args.recalibration_images, augment=True)
        inertial = make_inertial(
            *dense,
            macs=args.macs,
            latency=args.latency,
            calibration=draw(args.calibration_images, augment=False),
            recalibration=recalibration,
            layers=args.layers,
            tile_size=args.tile_size,
            metric=args.metric,
            reference=args.reference,
            low=args.low,
            channel_stride=args.channel_stride,
            latency_batch=args.timed_batch or 1,
            progress=progress,
        )
        stages["inertial"] = inertial
    else:
        stages["raw"] = raw = _make_tucker2(args, network, draw, progress)
        recalibrated = recalibrate(raw)
        if recalibrated is not raw:
            stages["recalibrated"] = recalibrated
    if args.reconstruction_images:
        say("fitting kernels to the outputs of the dense layers")
        model, variables = next(reversed(stages.values()))
        variables = reconstruct(
            model,
            variables,
            dense=dense,
            images=draw(args.reconstruction_images, augment=True),
            layers=args.layers,
            progress=progress,
        )
        stages["reconstructed"] = recalibrate((model, variables))
    return stages


def images_to_time(args: Compress, network: NetworkDescription, split: Split) -> Any:
    """Returns training images on which an inertial network is timed, not augmented."""
    least = 2  # that `training_inputs` draws
    drawn = _drawer(args, split, network)(max(least, args.timed_batch), augment=False)
    return drawn[: args.timed_batch]


def save_compressed(
    args: Compress,
    dense: NetworkDescription,
    small: Network,
    *,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Writes the compressed network's checkpoint.

    Args:
        args: The options, complete.
        dense: The network before.
        small: The network after.
        results: What was measured, which `read_compressed` returns.

    Raises:
        UsageError: It cannot be written.
    """
    info = {
        **dense.info,
        # What is there is the dense network's.
        "evaluation": None,
        "validation": None,
        "compressed": dataclasses.asdict(args),
        "compression_results": results,
    }
    metadata = dataclasses.replace(dense.metadata, info=info)
    with user_input():
        save_checkpoint(args.out, *small, metadata=metadata)


def read_compressed(args: Compress) -> tuple[Network, Mapping[str, Any]]:
    """Returns the network that a compression has written, and what it had measured.

    Raises:
        UsageError: The checkpoint is not that of these options.
    """
    out = pathlib.Path(args.out)
    network = read_network(out)
    here = {**json.loads(json.dumps(dataclasses.asdict(args))), "resume": None}
    there = {**network.info.get("compressed", {}), "resume": None}
    results = network.info.get("compression_results")
    differing = differing_fields(there, here)
    if differing or results is None:
        why = "; ".join(differing) or "it does not say what was measured"
        raise UsageError(
            f"`out` (={out}) is not of this compression; nothing was changed: {why}."
        )
    return (network.model, network.variables), results


def _drawer(
    args: Compress, split: Split, network: NetworkDescription
) -> Callable[..., Any]:
    """Returns a function that draws training images, plain or augmented."""
    preprocessing, dtype = network.preprocessing, jnp.dtype(network.model.dtype)
    plain = Augmentation.plain(preprocessing, dtype)

    def draw(count: int, *, augment: bool) -> Any:
        augmentation = plain
        if augment:
            as_trained = needed_augmentation(args, network)
            augmentation = Augmentation(preprocessing, as_trained, dtype)
        return training_inputs(split, augmentation, count, seed=args.seed)

    return draw


def _make_tucker2(
    args: Compress,
    network: TrainedNetwork,
    draw: Callable[..., Any] | None,
    progress: Progress | None,
) -> Network:
    rule = parse_ranks(args.ranks or "")
    if isinstance(rule, Budget) and rule.of == "latency":
        batch_size = args.timed_batch or rule.batch_size
        rule = dataclasses.replace(rule, batch_size=batch_size, device=args.device)
    calibration = None
    if args.weigh and draw is not None:
        calibration = draw(args.calibration_images, augment=False)
    return compress(
        network.model,
        network.variables,
        ranks=rule,
        method="hooi" if args.method == "hooi" else "hosvd",
        calibration=calibration,
        layers=args.layers,
        keep_stem=args.keep_stem,
        round_to=args.round_to,
        image_shape=network.preprocessing.image_shape,
        progress=progress,
    )


def _recalibrated(
    args: Compress, network: Network, *, draw: Callable[..., Any], batch_size: int
) -> Network:
    """Returns a network with statistics of training images, or itself without any."""
    model, variables = network
    has_statistics = running_statistics(variables) and takes_train(model)
    if not args.recalibration_images or not has_statistics:
        return network
    # Recalibration must not change thresholds.
    fixed_model = model.clone(plan=model.plan.with_fixed_thresholds())
    with waiting("recalibrating BatchNorm"):
        images = draw(args.recalibration_images, augment=True)
        return model, recalibrate_batch_norm(
            fixed_model, variables, images, batch_size=batch_size
        )
