"""The teacher of a run: its checkpoint is found, read and checked."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inertia_jax.metadata import Preprocessing
from inertia_jax.plan.plan import without_ladders
from train.config import Config
from train.config_file import differing_fields
from train.data import ImageSet, warn_of_other_names
from train.errors import UsageError
from train.fit.held_out import check_held_out
from train.networks import read_network
from train.run.checkpoints import find_checkpoint
from train.step.distill import Distillation
from train.step.state import training_dtype, widened


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that teaches another.

    Attributes:
        distillation: The teacher's part in the compiled step.
        variables: The teacher's variables, an argument of the step.
        sha256: The hash of the variables, by which a resumed run knows its teacher.
    """

    distillation: Distillation
    variables: dict[str, Any]
    sha256: str


def resolve_teacher(config: Config) -> Config:
    """Returns the configuration with a checkpoint in place of the teacher's run.

    The teacher's run may later have a better checkpoint, but a resumed run must keep
    the teacher that it began with.

    Raises:
        UsageError: The teacher is neither a checkpoint nor a run.
    """
    if config.teacher is None:
        return config
    try:
        path = find_checkpoint(config.teacher)
    except UsageError as error:
        raise UsageError(f"`teacher`: {error}") from error
    return dataclasses.replace(config, teacher=str(path.absolute()))


def load_teacher(
    config: Config, preprocessing: Preprocessing, data: ImageSet
) -> Teacher | None:
    """Returns the configured teacher, or None without one.

    Args:
        config: The run's configuration.
        preprocessing: The run's preprocessing, which the teacher must share.
        data: The run's data, whose number of classes the teacher must share.

    Raises:
        UsageError: The checkpoint is missing or damaged, does not fit, or was trained
            on the run's test images.
    """
    path = resolve_teacher(config).teacher
    if path is None:
        return None
    try:
        network = read_network(pathlib.Path(path), fallback=config.model.factory)
    except UsageError as error:
        raise UsageError(f"`teacher` (={path}) cannot teach: {error}") from error
    model = network.model
    differing = differing_fields(
        {
            "num_classes": model.num_classes,
            **dataclasses.asdict(network.preprocessing),
        },
        {"num_classes": data.num_classes, **dataclasses.asdict(preprocessing)},
    )
    if differing:
        raise UsageError(
            f"`teacher` (={path}) must have the run's classes and preprocessing: "
            f"{'; '.join(differing)}."
        )
    if model.dtype == "float64" and jnp.result_type(float) != "float64":
        raise UsageError(f"`teacher` (={path}), in float64, needs JAX_ENABLE_X64=1.")
    check_held_out(f"`teacher` (={path})", config, data, network.info)
    # Without ladders the logits are the same, and the step has no switch of capacities.
    model = without_ladders(model)
    order = data.places_in(network.class_names)
    if order is None:
        warn_of_other_names(data, network.class_names)
    distillation = Distillation(
        model,
        weight=config.distill_weight,
        temperature=config.distill_temperature,
        order=order,
    )
    # Where XLA may, BatchNorm takes roots of narrow statistics in their type.
    variables = widened(network.variables, training_dtype(model))
    return Teacher(distillation, variables, hash_variables(network.variables))


def hash_variables(variables: dict[str, Any]) -> str:
    """Returns the SHA-256 of a network's variables: names, types, shapes and values."""
    # A rewritten file with equal variables is the same teacher: files are not hashed.
    digest = hashlib.sha256()
    for path, value in jax.tree.leaves_with_path(variables):
        array = np.asarray(value)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
