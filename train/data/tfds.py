"""TensorFlow Datasets: prepared once with TensorFlow, read without it."""

import fcntl
import importlib
import pathlib
import re
import sys
import urllib.parse
from typing import Any

import numpy as np

from inertia_jax.metadata import shortest_sides
from inertia_jax.ops.inertial.settings import near_miss
from train.data.cache import Splits, cached_set, read_set
from train.data.held_out import HOW_TO_HOLD_OUT, HeldOut
from train.data.resize import resize_and_crop
from train.data.sets import ImageSet

_INSTALL = "pip install '.[tfds]' in the checkout"


def load_tfds(
    name: str,
    *,
    cache_dir: str,
    sides: tuple[int, int] | None,
    how_to_resize: str,
    held_out: HeldOut,
) -> ImageSet:
    """Reads any TFDS image classification set, kept decoded.

    The first use downloads and prepares it into array_record files, which needs
    TensorFlow and a network; later uses need neither, nor TFDS. If images differ in
    size, all are brought to these `sides`; otherwise they stay as stored.

    Raises:
        ImportError: A package is missing; the message says how to install it.
        ValueError: TFDS knows no such set, it is none of labelled images, or its images
            differ in size and `sides` is None, or nothing can be held out of them.
        OSError: The download failed; the message says what to do without a network.
    """
    cache = pathlib.Path(cache_dir).expanduser()
    stored = cache / f"tfds-{name.replace('/', '-').replace(':', '-')}"
    size = None if sides is None else shortest_sides(sides)
    suffix = "x".join(map(str, size)) if isinstance(size, tuple) else size
    resized = stored.with_name(f"{stored.name}-{suffix}")
    for directory in (stored, resized):
        if directory.is_dir():  # only read: the disk may be read-only
            return read_set(directory, name, held_out)
    cache.mkdir(parents=True, exist_ok=True)
    # Processes take turns: TFDS fails if another has prepared the set meanwhile.
    with (cache / ".tfds.lock").open("a") as lock:  # a link's file keeps its content
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder = _prepared_builder(name, cache / "tfds", held_out)
        directory, resize_to = stored, None
        if None in builder.info.features["image"].shape:
            if sides is None:
                raise ValueError(
                    f"{name} has images of several sizes; {how_to_resize}."
                )
            directory, resize_to = resized, sides

        def decode() -> tuple[Splits, tuple[str, ...]]:
            splits = {
                ours: _decode_split(name, builder, theirs, resize_to)
                for ours, theirs in _split_names(name, builder, held_out).items()
            }
            return splits, tuple(builder.info.features["label"].names)

        return cached_set(directory, name, decode, held_out)


def _prepared_builder(name: str, data_dir: pathlib.Path, held_out: HeldOut) -> Any:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ImportError(f"tfds:{name} needs TFDS: {_INSTALL}.") from error
    # A builder made from files needs no TensorFlow; one made from a name does.
    set_name, _, version = name.partition(":")
    files = (data_dir / set_name).glob(f"{version or '*'}/dataset_info.json")
    # Versions are A.B.C; other folders are a set's configurations.
    prepared = {
        tuple(map(int, file.parent.name.split("."))): file.parent
        for file in files
        if re.fullmatch(r"\d+\.\d+\.\d+", file.parent.name)
    }
    if prepared:
        builder = tfds.builder_from_directory(prepared[max(prepared)])
        _split_names(name, builder, held_out)
        return builder
    try:
        importlib.import_module("tensorflow")
    except ImportError as error:
        raise ImportError(f"preparing {name} needs TensorFlow: {_INSTALL}.") from error
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        near = near_miss(name, tfds.list_builders())
        raise ValueError(f"TFDS has no data set {name!r}.{near}") from error
    _split_names(name, builder, held_out)
    if builder.is_prepared():
        return builder
    print(f"downloading and preparing {name}, once", file=sys.stderr)
    # Ten tries, with longer and longer pauses, take minutes where there is no network.
    place = "tensorflow_datasets.core.download.downloader"
    downloader: Any = importlib.import_module(place)
    downloader.MAX_RETRIES = 2
    try:
        builder.download_and_prepare(file_format="array_record")
    # TFDS reports a failed download as DownloadError, requests' errors, OSError or
    # tf.errors, depending on the version and on where it failed.
    except Exception as error:
        raise OSError(
            f"could not download and prepare {name}: {_reason(error)}; without a "
            f"network, prepare it on a machine that has one, by the same command, "
            f"and copy {builder.data_dir} here, or use npz:PATH, imagefolder:PATH or "
            f"digits."
        ) from error
    return builder


def _reason(error: BaseException) -> str:
    """Returns why a download failed, in a line."""
    # An error of requests, without an answer to the request.
    request = getattr(error, "request", None)
    if request is not None and getattr(error, "response", None) is None:
        return f"{urllib.parse.urlsplit(request.url).hostname} cannot be reached"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _split_names(name: str, builder: Any, held_out: HeldOut) -> dict[str, str]:
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(
        features["label"], "names"
    ):
        raise ValueError(
            f"{name} has features {sorted(features)}; must be image, label."
        )
    splits = set(builder.info.splits)
    if not splits:  # known only after preparing
        return {}
    test = "test" if "test" in splits else "validation"
    if "train" in splits and test not in splits and held_out.test_share:
        return {"train": "train"}
    if not {"train", test} <= splits:
        advice = f" ({HOW_TO_HOLD_OUT})" if "train" in splits else ""
        raise ValueError(
            f"{name} has splits {sorted(splits)}; must be train, test{advice}."
        )
    return {"train": "train", "test": test}


def _decode_split(
    name: str, builder: Any, split: str, sides: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    try:
        source = builder.as_data_source(split=split)
        examples = [(np.asarray(e["image"]), int(e["label"])) for e in source]
    except ImportError as error:
        raise ImportError(f"reading {name} needs more: {_INSTALL}.") from error
    images = [image for image, _ in examples]
    if sides is not None:
        images = [resize_and_crop(image, sides) for image in images]
    return np.stack(images), np.array([label for _, label in examples], np.int32)
