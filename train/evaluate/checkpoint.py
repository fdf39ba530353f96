"""Evaluation of a checkpoint's network on any data that fit it."""

from collections.abc import Callable, Mapping
from typing import Any

from train.config import Data
from train.data import ImageSet, load_data, warn_of_other_names
from train.data.augment import Augmentation
from train.data.feed import make_feed
from train.data.held_out import check_as_trained
from train.errors import UsageError, shortened
from train.evaluate.evaluation import Evaluation, make_evaluator
from train.evaluate.settings import EvaluationSettings
from train.machine.parallel import Parallel
from train.machine.processes import first_devices, say, warn
from train.machine.waiting import waiting
from train.networks import NetworkDescription, TrainedNetwork


def evaluate_network(
    network: TrainedNetwork, settings: EvaluationSettings, *, source: str | None = None
) -> Evaluation:
    """Evaluates a network on a source's data; None: those that it was trained on.

    Raises:
        UsageError: The data do not fit the network, or no data are named.
    """
    source = source or network.source
    if source is None:
        raise UsageError(f"{network.path} names no data; say which with --data.")
    return evaluator_for(network, source, settings)(network.variables)


def evaluator_for(
    network: NetworkDescription, source: str, settings: EvaluationSettings
) -> Callable[[Mapping[str, Any]], Evaluation]:
    """Returns a function that evaluates variables of a network on a source's data.

    Raises:
        UsageError: The data do not fit the network.
    """
    data = load_fitting(network, source, settings)
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

    return lambda variables: evaluate(parallel.replicate(variables))


def load_fitting(
    network: NetworkDescription, source: str, settings: EvaluationSettings
) -> ImageSet:
    """Returns a source's data, with the classes of a network where names tell them.

    Raises:
        UsageError: The data do not fit the network.
    """
    preprocessing, trained_on = network.preprocessing, network.trained_on
    height, width, channels = preprocessing.image_shape
    resize = settings.resize or bool(trained_on and trained_on.image_size)
    size = preprocessing.resized_sides if resize else None
    data = load_data(
        source,
        cache_dir=settings.cache_dir,
        image_size=size,
        how_to_resize="--resize resizes them",
        held_out=network.held_out_of(source),
    )
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
