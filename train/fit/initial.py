"""The checkpoint that a run starts from: checked before anything is compiled, read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from inertia_jax import Plan, init_variables
from inertia_jax.checkpoint import load_arrays, verify_checkpoint
from inertia_jax.models.create import abstract_variables
from train.config import Config
from train.config_file import differing_fields
from train.data import ImageSet, warn_of_other_names
from train.errors import UsageError, user_input
from train.fit.checks import check_same_everywhere
from train.fit.held_out import check_held_out
from train.machine.processes import say
from train.networks import (
    make_preprocessing,
    model_config,
    open_description,
    with_classes,
)
from train.run.checkpoints import find_checkpoint


def verify_initial(config: Config) -> None:
    """Checks the files of `config.init`, if that is set.

    Raises:
        UsageError: There is no checkpoint, or it is damaged.
    """
    if config.init is not None:
        with user_input():
            verify_checkpoint(find_checkpoint(config.init))


def check_initial(config: Config, data: ImageSet) -> ImageSet:
    """Checks that the checkpoint that a run starts from suits the run, if it has one.

    Returns:
        The data; where the last layer is kept, with its classes, by name.

    Raises:
        UsageError: There is no checkpoint, or it has another network or another
            normalisation.
    """
    if config.init is None:
        return data
    path, name = find_checkpoint(config.init), f"`init` (={config.init})"
    model, metadata = open_description(path, factory=config.model.factory)
    with user_input():
        own = make_preprocessing(config.data, data.image_shape)
    theirs = metadata.preprocessing
    if theirs is not None and (own.mean, own.std) != (theirs.mean, theirs.std):
        raise UsageError(
            f"{name} was trained with `mean` {theirs.mean} and `std` {theirs.std}; the "
            f"run has {own.mean} and {own.std}."
        )
    there, here = model_config(model), config.model
    plan = Plan.from_json(here.plan)
    differing = []
    if here.factory is None:  # which has made `model`, whatever other fields say
        differing = differing_fields(
            {**dataclasses.asdict(there), "plan": ""},
            {**dataclasses.asdict(here), "plan": "", "strict": there.strict},
        )
    if plan != model.plan:  # whose texts are long
        differing.append("plan")
    if differing:
        raise UsageError(
            f"{name} has another network than `model`: {'; '.join(differing)}."
        )
    check_held_out(name, config, data, metadata.info)
    if not config.new_head:
        if model.num_classes != data.num_classes:
            raise UsageError(
                f"{name} has {model.num_classes} classes, {data.name} has "
                f"{data.num_classes}; --new-head draws a last layer for them."
            )
        ours, data = data, named_as(data, metadata.class_names)
        warn_of_other_names(data, metadata.class_names)
        if data.class_names != ours.class_names:
            say(f"classes of {data.name} are those of {config.init} by their names")
    if theirs is not None and theirs.image_shape != own.image_shape:
        wanted = _shapes(model, theirs.image_shape)
        if differing := differing_fields(wanted, _shapes(model, own.image_shape)):
            raise UsageError(
                f"{name} takes images of {theirs.image_shape}, the run has "
                f"{own.image_shape}, for which layers have other sizes: {differing[0]}."
            )
    return data


def named_as(data: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Returns data whose labels count a checkpoint's classes, if names tell them all.

    Otherwise, the data are returned as they are.
    """
    if data.num_classes != len(class_names):
        return data
    return data.with_classes(class_names) or data


def read_initial(
    config: Config,
    data: ImageSet,
    model: nn.Module,
    key: jax.Array,
    *,
    expected: dict[str, Any],
) -> dict[str, Any]:
    """Returns the variables of `config.init`, which is set.

    With `config.new_head`, the last layer is drawn with `key`, and nothing else is.
    `verify_initial` and `check_initial` have passed. `expected` has the shapes of the
    model's variables.

    Raises:
        UsageError: The variables are not those of the network.
    """
    path = find_checkpoint(str(config.init))
    with user_input():
        variables = load_arrays(path)["variables"]
    if jax.process_count() > 1:
        check_same_everywhere(path, variables)
    shape = make_preprocessing(config.data, data.image_shape).image_shape
    kept = _flat(variables)
    if config.new_head:
        head = head_paths(model, shape)

        @jax.jit
        def draw(key: jax.Array) -> dict[str, Any]:
            drawn = _flat(init_variables(model, key, shape))
            return {name: drawn[name] for name in head}

        kept |= draw(key)
    if differing := differing_fields(_shapes_of(kept), _shapes_of(_flat(expected))):
        raise UsageError(
            f"`init` (={config.init}) has not the variables of its network: "
            f"{'; '.join(differing[:3])}."
        )
    return traverse_util.unflatten_dict(kept, sep="/")


def head_paths(model: nn.Module, image_shape: tuple[int, int, int]) -> set[str]:
    """Returns the `/` paths of the variables whose shapes depend on the classes."""
    more = with_classes(model, model.num_classes + 1)
    ours, theirs = (_shapes(m, image_shape) for m in (model, more))
    return {path for path in ours if ours[path] != theirs[path]}


def _shapes(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    return _shapes_of(_flat(abstract_variables(model, image_shape)))


def _shapes_of(flat: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flat.items()}


def _flat(variables: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")
