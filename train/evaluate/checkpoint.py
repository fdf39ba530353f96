"""Evaluation of a checkpoint's network on any data that fit it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.config import Data
from train.data import ImageSet, load_data, warn_of_other_names
from train.data.augment import Augmentation
from train.data.feed import make_feed
from train.data.held_out import NOTHING, HeldOut, check_as_trained
from train.errors import UsageError, shortened
from train.evaluate.evaluation import Evaluation, make_evaluator
from train.evaluate.settings import EvaluationSettings
from train.machine.parallel import Parallel
from train.machine.processes import first_devices, say, warn
from train.machine.waiting import waiting
from train.networks import NetworkDescription, TrainedNetwork


def evaluate_network(
    network: TrainedNetwork,
    settings: EvaluationSettings,
    *,
    source: str | None = None,
    held_out: HeldOut | None = None,
) -> Evaluation:
    """Evaluates a network on a source's data; None: those that it was trained on.

    Args:
        network: The network.
        settings: How test images are evaluated.
        source: The data.
        held_out: What was held out of them, as `load_fitting` takes it.

    Raises:
        UsageError: The data do not fit the network, or no data are named.
    """
    source = source or network.source
    if source is None:
        raise UsageError(f"{network.path} names no data; say which with --data.")
    evaluate = evaluator_for(network, source, settings, held_out=held_out)
    return evaluate(network.variables)


def held_out_of_all(networks: Sequence[NetworkDescription], source: str) -> HeldOut:
    """Returns what was held out of a source as test images of all these networks.

    Raises:
        UsageError: It was not the same: what one is tested on may be what another was
            trained on.
    """
    found = [(network, network.held_out_of(source)) for network in networks]
    found = [(network, held) for network, held in found if held.test_share]
    draws = {(held.test_share, held.seed): network for network, held in found}
    if len(draws) > 1:
        first, second, *_ = draws.values()
        raise UsageError(
            f"{first.path} and {second.path} held other images of {source} out as test "
            f"images, so that there are none to compare their answers to."
        )
    return found[0][1] if found else NOTHING


def evaluator_for(
    network: NetworkDescription,
    source: str,
    settings: EvaluationSettings,
    *,
    held_out: HeldOut | None = None,
) -> Callable[[Mapping[str, Any]], Evaluation]:
    """Returns a function that evaluates variables of a network on a source's data.

    Raises:
        UsageError: The data do not fit the network.
    """
    data = load_fitting(network, source, settings, held_out=held_out)
    evaluate = evaluator_on(network, data, settings)

    def run(variables: Mapping[str, Any]) -> Evaluation:
        with waiting(f"evaluating on {source}"):
            return evaluate(variables)

    return run


def evaluator_on(
    network: NetworkDescription, data: ImageSet, settings: EvaluationSettings
) -> Callable[[Mapping[str, Any]], Evaluation]:
    """Returns a function that evaluates variables of a network on data that fit it."""
    parallel = Parallel("pmap", tuple(first_devices(settings.devices)))
    evaluate = make_evaluator(
        network.model,
        Augmentation.plain(network.preprocessing, network.model.dtype),
        make_feed(data.test, parallel, memory_share=Data.memory_share),
        parallel,
        batch_size=settings.batch_size,
        class_names=_class_names(network, data),
        flip_test=settings.flip_test,
    )

    def run(variables: Mapping[str, Any]) -> Evaluation:
        found = evaluate(parallel.replicate(variables))
        return dataclasses.replace(found, held_out=data.held_out.get("test"))

    return run


def load_fitting(
    network: NetworkDescription,
    source: str,
    settings: EvaluationSettings,
    *,
    held_out: HeldOut | None = None,
) -> ImageSet:
    """Returns a source's data, with the classes of a network where names tell them.

    Args:
        network: The network.
        source: The data.
        settings: How test images are evaluated.
        held_out: What was held out of them as test images; None: what the network's
            training held out.

    Raises:
        UsageError: The data do not fit the network.
    """
    preprocessing, trained_on = network.preprocessing, network.trained_on
    height, width, channels = preprocessing.image_shape
    resize = settings.resize or bool(trained_on and trained_on.image_size)
    size = preprocessing.resized_sides if resize else None
    its_own = network.held_out_of(source)
    data = load_data(
        source,
        cache_dir=settings.cache_dir or network.cache_dir,
        image_size=size,
        how_to_resize="--resize resizes them",
        held_out=its_own if held_out is None else held_out,
    )
    if its_own.test_share:
        check_as_trained(data.name, data.held_out, network.info, splits=("test",))
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
    by_name = data.with_classes(network.class_names)
    if by_name is not None:
        if by_name.class_names != data.class_names:
            say(f"classes of {data.name} are those of the network by their names")
        return by_name
    warn_of_other_names(data, network.class_names)
    highest, num_classes = int(data.test.labels.max()), network.model.num_classes
    if highest >= num_classes:
        raise UsageError(
            f"{data.name} has label {highest}; the network has {num_classes} classes."
        )
    if data.num_classes != num_classes:
        warn(
            f"{data.name} has {data.num_classes} classes, the network {num_classes}; "
            f"classes are compared by their numbers, from 0 "
            f"({shortened(data.class_names[0])} in the data)."
        )
    return data


def _class_names(network: NetworkDescription, data: ImageSet) -> tuple[str, ...]:
    if network.class_names:
        return network.class_names
    num_classes = network.model.num_classes
    unnamed = range(data.num_classes, num_classes)
    return (*data.class_names, *map(str, unnamed))[:num_classes]
