"""What a run is about to train, and what TensorBoard shows of its gates and images."""

from typing import Any

import numpy as np
from flax import traverse_util

from inertia_jax import count_cost
from train.evaluate.evaluation import Evaluation
from train.fit.trainer import Trainer
from train.networks import cost_in_words, kinds_in_words, name_in_words

# Images that are shown beside each other.
_NUM_SHOWN = 16


def describe_run(trainer: Trainer) -> str:
    """Returns network, cost, data, training and devices of a run, a line each."""
    config, data, shape = (
        trainer.config,
        trainer.data,
        trainer.preprocessing.image_shape,
    )
    optimizer, devices = config.optimizer, trainer.parallel.devices
    cost = count_cost(trainer.model, shape)
    lines = {
        "network": f"{name_in_words(trainer.model)}; layers: {kinds_in_words(cost)}",
        "cost": cost_in_words(cost),
        "data": f"{data.name}, {len(data.train or ()):,} training and "
        f"{len(data.test):,} test images, {data.num_classes} classes; input "
        f"{'x'.join(map(str, shape))}",
        "training": f"{config.epochs:,} epochs of {trainer.steps_per_epoch:,} steps of "
        f"{config.batch_size:,} images; {optimizer.name}, {optimizer.schedule} from "
        f"learning rate {trainer.learning_rate(1):.3g}",
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    }
    return "\n".join(f"{name:<13}{words}" for name, words in lines.items())


def first_images(trainer: Trainer) -> np.ndarray:
    """Returns the first training images as they are stored, uint8 [n, h, w, c].

    Of images that have neither one channel nor three, there are none.
    """
    images = np.asarray(trainer.feed.split.images[:_NUM_SHOWN])
    return images if images.shape[-1] in (1, 3) else images[:0]


def gate_histograms(evaluation: Evaluation, variables: Any) -> dict[str, np.ndarray]:
    """Returns gate rates of the test images, and thresholds, by TensorBoard's tag."""
    rates = {
        f"test/gate_rate/{path}": np.asarray(values)
        for path, values in evaluation.gate_rates_by_example.items()
    }
    flat = traverse_util.flatten_dict(variables, sep="/")
    thresholds = {
        f"thresholds/{path.partition('/')[2].rpartition('/')[0]}": np.asarray(value)
        for path, value in flat.items()
        if path.rpartition("/")[2] == "threshold"
    }
    return rates | thresholds
