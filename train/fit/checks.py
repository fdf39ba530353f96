"""Checks before training: data and devices must suit the configuration."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from inertia_jax import Inertial, Rate
from train.config import Config
from train.data import ImageSet, Split
from train.errors import UsageError
from train.fit.teacher import hash_variables
from train.machine.processes import differing_process, warn
from train.step.objective import is_held
from train.step.optimizer import scale_learning_rate

# The usual learning rates, and who says so; those of sgd are at a batch of 128 and
# momentum 0.9.
_USUAL_RATES = {
    "sgd": (0.01, 0.2, "Goyal et al., 2017, in proportion to the batch"),
    "adadelta": (0.1, 1.0, "Zeiler, 2012"),
    "adamw": (1e-4, 2e-3, "Loshchilov and Hutter, 2019"),
    "lion": (1e-5, 6e-4, "Chen et al., 2023, a third to a tenth of adamw's"),
    "muon": (1e-4, 4e-3, "Liu et al., 2025, those of adamw"),
}


def warn_of_unreached(config: Config) -> None:
    """Warns on standard error of falls of the learning rate that come too late."""
    optimizer = config.optimizer
    name, epochs = "", list[int]()
    if optimizer.schedule == "multistep":
        name, epochs = "milestones", list(optimizer.milestones)
    elif optimizer.schedule == "exponential":
        name, epochs = "decay_epochs", [optimizer.decay_epochs]
    late = [str(epoch) for epoch in epochs if epoch >= config.epochs]
    if late:
        warn(
            f"the learning rate does not fall after epoch {', '.join(late)} "
            f"(`optimizer.{name}`): the run ends after epoch {config.epochs}."
        )


def warn_of_learning_rate(config: Config) -> None:
    """Warns on standard error of a learning rate far above those that are usual.

    That is five times the highest. In a training from random weights, a hundredth of
    the lowest is warned of, too. Those of sgd are scaled with the batch, and with what
    momentum makes of a step: `(batch_size / 128) (1 - momentum) / 0.1`.
    """
    optimizer = scale_learning_rate(config.optimizer, batch_size=config.batch_size)
    rate, name = optimizer.learning_rate, optimizer.name
    low, high, source = _USUAL_RATES[name]
    if name == "sgd":
        scale = config.batch_size / 128 * (1 - optimizer.momentum) / 0.1
        low, high = low * scale, high * scale
    if rate > 5 * high:
        consequence = "the loss may grow instead of falling"
    elif rate < low / 100 and config.init is None:
        consequence = "the network may hardly learn"
    else:
        return
    warn(
        f"the learning rate {rate:.3g} is far from the usual ones of {name} at a batch "
        f"of {config.batch_size}, {low:.2g} to {high:.2g} ({source}): {consequence}."
    )


def check_trainable(config: Config, data: ImageSet, num_devices: int) -> Split:
    """Returns the training images.

    Raises:
        UsageError: There are none, or `batch_size` does not suit them or the devices.
    """
    if data.train is None:
        raise UsageError(f"{data.name} has no training images.")
    check_batch_size("batch_size", config.batch_size, len(data.train), num_devices)
    return data.train


def check_batch_size(
    name: str, batch_size: int, num_images: int, num_devices: int
) -> None:
    """Raises UsageError where a batch suits the devices or the training images ill."""
    if batch_size % num_devices:
        raise UsageError(
            f"`{name}` (={batch_size}) must be a multiple of the {num_devices} devices."
        )
    if batch_size > num_images:
        raise UsageError(
            f"`{name}` (={batch_size}) must be at most {num_images}, the number of "
            f"training images."
        )


def check_float64(config: Config) -> None:
    """Raises UsageError where the network needs float64 and JAX has it disabled."""
    if config.model.dtype == "float64" and jnp.result_type(float) != "float64":
        raise UsageError("`model.dtype` (=float64) needs JAX_ENABLE_X64=1.")


def check_gates(config: Config, specs: Sequence[Inertial], num_devices: int) -> None:
    """Checks the inertial layers of a run.

    Args:
        config: The run's configuration.
        specs: The specifications of the network's inertial layers.
        num_devices: The number of devices of all processes.

    Raises:
        UsageError: A budget could not move a gate, or gates depend on the whole batch
            while each device sees a share of it.
    """
    if config.gate_budget is not None and not any(map(is_held, specs)):
        raise UsageError(
            "`gate_budget` needs inertial layers with `gate_gradient` (='ste') in "
            "`model.plan`, their threshold no Rate; nothing else moves gates."
        )
    measured = [s for s in specs if s.relative or isinstance(s.threshold, Rate)]
    if measured and num_devices > 1 and not config.sync_batch_norm:
        raise UsageError(
            f"`sync_batch_norm` (=False) must be on for {measured[0]}, whose gates "
            f"depend on the whole batch."
        )


def check_same_everywhere(path: pathlib.Path, variables: dict[str, Any]) -> None:
    """Raises UsageError where a process reads other variables than the first."""
    other = differing_process(bytes.fromhex(hash_variables(variables)))
    if other is not None:
        raise UsageError(
            f"process {other} reads other variables for `init` than process 0, "
            f"which has {path}; name one checkpoint."
        )
