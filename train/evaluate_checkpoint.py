"""Evaluation of a checkpoint: its network, its preprocessing, any data that fit."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from inertia_jax import CostTable, count_cost, load_checkpoint
from inertia_jax.metadata import Metadata, load_metadata
from train.augment import Augmentation
from train.class_names import warn_of_other_names
from train.config import Data
from train.data import ImageSet, load_data
from train.errors import UsageError, user_input
from train.evaluate import Evaluation, make_evaluator
from train.feed import make_feed
from train.parallel import Parallel
from train.processes import first_devices


def cost_at_rates(path: pathlib.Path, gate_rates: Mapping[str, float]) -> CostTable:
    """Returns what a checkpoint's network costs at measured gate rates."""
    model, _ = load_checkpoint(path)
    preprocessing = load_metadata(path).preprocessing
    if preprocessing is None:
        raise ValueError(f"{path} has no preprocessing.")
    return count_cost(model, preprocessing.image_shape, gate_rates=gate_rates)


def recorded_source(path: pathlib.Path) -> str | None:
    """Returns the data that a checkpoint says it was trained on, if it says."""
    with user_input():
        info = load_metadata(path).info
    return info.get("config", {}).get("data", {}).get("source") or None


def evaluate_checkpoint(
    path: pathlib.Path,
    *,
    source: str | None = None,
    cache_dir: str = Data.cache_dir,
    batch_size: int = 500,
    num_devices: int | None = None,
    resize: bool = False,
    flip_test: bool = False,
) -> Evaluation:
    """Evaluates a checkpoint.

    Raises:
        UsageError: A damaged checkpoint, or data that do not fit it.
    """
    if batch_size < 1:
        raise UsageError(f"`batch_size` (={batch_size}) must be >= 1.")
    first_devices(num_devices)  # before anything is read
    with user_input():
        model, variables = load_checkpoint(path)
        metadata = load_metadata(path)
    source = source or recorded_source(path)
    if source is None:
        raise UsageError(f"{path} names no data; say which with --data.")
    if metadata.preprocessing is None:
        raise UsageError(f"{path} has no preprocessing; it cannot be evaluated.")
    evaluate = evaluator_for(
        model,
        metadata,
        source=source,
        cache_dir=cache_dir,
        batch_size=batch_size,
        num_devices=num_devices,
        resize=resize,
        flip_test=flip_test,
    )
    return evaluate(variables)


def evaluator_for(
    model: nn.Module,
    metadata: Metadata,
    *,
    source: str,
    cache_dir: str = Data.cache_dir,
    batch_size: int = 500,
    num_devices: int | None = None,
    resize: bool = False,
    flip_test: bool = False,
) -> Callable[[Mapping[str, Any]], Evaluation]:
    """Returns a function from variables to what evaluating a checkpoint of them finds.

    Raises:
        UsageError: Data that do not fit it.
    """
    preprocessing = metadata.preprocessing
    if preprocessing is None:
        raise ValueError("`metadata` must have a preprocessing.")
    trained_on = metadata.info.get("config", {}).get("data", {})
    resize = resize or trained_on.get("image_size") is not None
    size = max(preprocessing.image_shape[0], preprocessing.resize or 0)
    data = load_data(source, cache_dir=cache_dir, image_size=size if resize else None)
    _check_fit(data, metadata, model.num_classes, resize=resize)
    parallel = Parallel("pmap", tuple(first_devices(num_devices)))
    evaluate = make_evaluator(
        model,
        Augmentation(
            preprocessing,
            crop_padding=0,
            flip=False,
            resized_crop=False,
            dtype=jnp.dtype(model.dtype),
        ),
        make_feed(data.test, parallel, memory_share=Data.memory_share),
        parallel,
        batch_size=batch_size,
        class_names=_class_names(data, metadata, model.num_classes),
        flip_test=flip_test,
    )
    return lambda variables: evaluate(parallel.replicate(variables))


def _check_fit(
    data: ImageSet, metadata: Metadata, num_classes: int, *, resize: bool
) -> None:
    preprocessing = metadata.preprocessing
    if preprocessing is None:
        raise ValueError("checked by the caller.")
    height, width, channels = preprocessing.image_shape
    if data.image_shape[2] != channels:
        raise UsageError(
            f"{data.name} has {data.image_shape[2]} channels; the network takes "
            f"{channels}."
        )
    if data.image_shape[:2] != (height, width) and not resize:
        raise UsageError(
            f"{data.name} has images of {data.image_shape[0]} x {data.image_shape[1]}; "
            f"the network was trained on {height} x {width} (--resize resizes them)."
        )
    warn_of_other_names(data, metadata)
    highest = int(data.test.labels.max())
    if highest >= num_classes:
        raise UsageError(
            f"{data.name} has label {highest}; the network has {num_classes} classes."
        )


def _class_names(
    data: ImageSet, metadata: Metadata, num_classes: int
) -> tuple[str, ...]:
    if metadata.class_names:
        return metadata.class_names
    unnamed = range(data.num_classes, num_classes)
    return (*data.class_names, *map(str, unnamed))[:num_classes]
