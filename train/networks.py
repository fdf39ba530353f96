"""A network from a configuration, or from a checkpoint, which is opened once."""

import collections
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax import CostTable, Plan, count_cost, create_model
from inertia_jax.checkpoint import load_arrays, verify_checkpoint
from inertia_jax.differences import differing_from
from inertia_jax.layers.kinds import CONVOLUTIONS
from inertia_jax.metadata import (
    Metadata,
    Preprocessing,
    both_sides,
    load_description,
)
from inertia_jax.models.create import model_name
from train.config import Config, Data, Model
from train.data.held_out import HELD_OUT, HeldOut, as_trained, source_name
from train.errors import UsageError, user_input
from train.machine.processes import say
from train.own_network import (
    OwnNetwork,
    check_own_network,
    find_factory,
    make_own_network,
)


@dataclasses.dataclass(frozen=True)
class NetworkDescription:
    """A checkpoint's network; the last three fields are those of `Metadata`."""

    path: pathlib.Path
    model: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    info: Mapping[str, Any]

    @property
    def recorded_data(self) -> dict[str, Any]:
        """Fields of `Data` that are recorded: those of the training, or of `compress`.

        What `compress` was told about the data comes later than the training.
        """
        config, compressed = self.info.get("config"), self.info.get("compressed")
        data = config.get("data") if isinstance(config, Mapping) else None
        recorded = dict(data) if isinstance(data, Mapping) else {}
        if isinstance(compressed, Mapping) and compressed.get("data"):
            told = {"source": compressed["data"]} | {
                name: compressed.get(name)
                for name in ("cache_dir", "crop_padding", "flip", "resized_crop")
            }
            told = {name: v for name, v in told.items() if v is not None}
            if source_name(told["source"]) != source_name(recorded.get("source", "")):
                # What was held out are images of the training's source.
                recorded = {n: v for n, v in recorded.items() if n not in HELD_OUT}
            recorded |= told
        # A later version may have more fields.
        names = {field.name for field in dataclasses.fields(Data)}
        return {name: value for name, value in recorded.items() if name in names}

    @property
    def trained_on(self) -> Data | None:
        """Data and augmentation of the training; None if they are not recorded.

        Where augmentation is not recorded, there is none; normalisation is then that
        of the preprocessing.

        Raises:
            UsageError: They are recorded in another form.
        """
        if not self.recorded_data:
            return None
        known: dict[str, Any] = {
            "source": "",
            "mean": self.preprocessing.mean,
            "std": self.preprocessing.std,
            "crop_padding": 0,
            "flip": False,
        }
        for name, value in self.recorded_data.items():
            known[name] = tuple(value) if isinstance(value, list) else value
        try:
            return Data(**known)
        except (TypeError, UsageError) as error:
            raise UsageError(
                f"{self.path} does not say in a known form what it was trained on: "
                f"{error}"
            ) from error

    @property
    def unknown_augmentation(self) -> list[str]:
        """Fields of `Data` that say how images are augmented, and are not recorded."""
        return [
            name for name in ("crop_padding", "flip") if name not in self.recorded_data
        ]

    @property
    def source(self) -> str | None:
        """Source of the data that the network was trained on, if it is recorded."""
        data = self.trained_on
        return (data.source or None) if data else None

    @property
    def cache_dir(self) -> str:
        """Directory in which decoded sets are kept: the training's if it is here."""
        data = self.trained_on
        if data is not None and os.path.isdir(os.path.expanduser(str(data.cache_dir))):
            return str(data.cache_dir)
        return Data.cache_dir

    @property
    def gate_rates(self) -> dict[str, float]:
        """Gate rates of the evaluation that is recorded, by the layers' paths."""
        evaluation = self.info.get("evaluation")
        prefix = "gate_rate/"
        found = evaluation if isinstance(evaluation, Mapping) else {}
        return {
            name.removeprefix(prefix): rate
            for name, rate in found.items()
            if name.startswith(prefix)
        }

    def held_out_of(self, source: str) -> HeldOut:
        """Returns what the training held out of a source; of another: nothing."""
        return as_trained(self.trained_on, source)

    @property
    def metadata(self) -> Metadata:
        """The description, as `save_checkpoint` takes it."""
        return Metadata(self.preprocessing, self.class_names, self.info)

    def cost(self, gate_rates: Mapping[str, float] | None = None) -> CostTable:
        """Returns what the network costs, at measured gate rates if any are given."""
        shape = self.preprocessing.image_shape
        return count_cost(self.model, shape, gate_rates=gate_rates or {})


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork(NetworkDescription):
    """A checkpoint's network with its variables, which are NumPy arrays."""

    variables: dict[str, Any]


def open_description(
    path: pathlib.Path, *, factory: str | None = None, fallback: str | None = None
) -> tuple[nn.Module, Metadata]:
    """Reads a checkpoint's network and metadata; no hash is checked.

    Args:
        path: The checkpoint.
        factory: What makes a network of the user's own, as MODULE:FUNCTION; None: what
            the checkpoint says.
        fallback: What makes a network of the user's own where the checkpoint does not
            say it, or says what is not found: that of another network beside it.

    Raises:
        UsageError: There is no checkpoint at `path`, its description is broken, or its
            network cannot be made.
    """

    def make(about: Mapping[str, Any], metadata: Metadata) -> nn.Module:
        name = factory or about.get("factory") or fallback
        num_classes = about.get("num_classes") or len(metadata.class_names)
        if not name:
            raise UsageError(
                f"{path} has a {about['class']} and does not say what makes it; say "
                f"--model.factory MODULE:FUNCTION."
            )
        if not num_classes:
            raise UsageError(
                f"{path} does not say how many classes it has; save it with "
                f"`class_names` in its metadata."
            )
        if fallback and name not in (factory, fallback):
            try:
                find_factory(name)
            except UsageError as error:
                say(f"{error} {path} is read with {fallback}.")
                name = fallback
        return make_own_network(str(name), num_classes=num_classes)

    with user_input():
        model, metadata = load_description(path, make)
    if factory and not isinstance(model, OwnNetwork):
        raise UsageError(
            f"`model.factory` (={factory}) does nothing with {path}, which has a "
            f"{model_name(model)} of this library."
        )
    return model, metadata


def read_description(
    path: pathlib.Path, *, factory: str | None = None, fallback: str | None = None
) -> NetworkDescription:
    """Reads a checkpoint's network without its variables, as `open_description` does.

    Raises:
        UsageError: As `open_description`, or the checkpoint does not say how images
            become the network's input.
    """
    model, metadata = open_description(path, factory=factory, fallback=fallback)
    if metadata.preprocessing is None:
        raise UsageError(
            f"{path} has no preprocessing: it does not say how images become its input."
        )
    return NetworkDescription(
        path, model, metadata.preprocessing, metadata.class_names, metadata.info
    )


def read_network(
    path: pathlib.Path, *, factory: str | None = None, fallback: str | None = None
) -> TrainedNetwork:
    """Reads a checkpoint's network, every file checked against its SHA-256.

    Raises:
        UsageError: As `read_description`, or the checkpoint is damaged, or has not the
            variables of its network.
    """
    say(f"reading {path}")
    with user_input():
        verify_checkpoint(path)
    description = read_description(path, factory=factory, fallback=fallback)
    with user_input():
        variables = load_arrays(path)["variables"]
    model, shape = description.model, description.preprocessing.image_shape
    # A network in float64 can be read, and cast, where float64 is off.
    is_wide = np.dtype(model.dtype) == np.float64
    with jax.enable_x64(True) if is_wide else contextlib.nullcontext():
        differing = differing_from(model, variables, shape)
    if differing:
        named = "the network that it names"
        if isinstance(model, OwnNetwork):
            named = f"`model.factory` (={model.factory})"
        raise UsageError(f"{path} is not of {named}: {differing}.")
    return TrainedNetwork(**vars(description), variables=variables)


def name_in_words(model: Any) -> str:
    """Returns what a network is called, and what it has that is no default."""
    config = model_config(model)
    if config.factory is not None:
        return config.factory
    named = ("width", "stem", "shortcut", "dtype")
    given = {name: getattr(config, name) for name in named}
    told = [f"{k} {v}" for k, v in given.items() if v != getattr(Model, k)]
    return ", ".join([config.name, *told])


def cost_in_words(cost: CostTable) -> str:
    """Returns parameters and MACs, and the share of the dense network's."""
    words = f"{cost.params:,} parameters, {cost.total_macs:,} MACs an image"
    if cost.total_macs != cost.dense_macs:
        words += f", {cost.total_macs / cost.dense_macs:.3f} of the dense network's"
    return words


def kinds_in_words(cost: CostTable) -> str:
    """Returns how many convolutions of each kind a network has."""
    kinds = collections.Counter(row.kind for row in cost.rows)
    return ", ".join(f"{n} {k}" for k, n in kinds.most_common() if k in CONVOLUTIONS)


def cost_to_json(cost: CostTable) -> dict[str, int | float]:
    """Returns a network's cost, as it stands in records."""
    names = ("params", "dense_macs", "macs", "ladder_macs", "other_ops", "total_macs")
    return {name: getattr(cost, name) for name in names}


def check_model(config: Model) -> None:
    """Checks that there is such a network, before anything is known of the data.

    Raises:
        ValueError: The name is unknown, or an option is outside its range.
        UsageError: There is no such factory.
    """
    if config.factory is None:
        make_model(config, num_classes=1)
    else:
        find_factory(config.factory)
        Plan.from_json(config.plan)


def make_model(
    config: Model,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int] | None = None,
) -> Any:
    """Makes the configured network.

    Args:
        config: The configuration.
        num_classes: The number of classes.
        image_shape: The shape [h, w, c] of its input. None: a network of the user's own
            is not checked.

    Raises:
        ValueError: The name is unknown, or an option is outside its range.
        UsageError: The factory cannot make a network for such images.
    """
    plan = Plan.from_json(config.plan)
    if config.factory is not None:
        own = make_own_network(config.factory, num_classes=num_classes, plan=plan)
        if image_shape is not None:
            check_own_network(own, image_shape, strict=config.strict)
        return own
    return create_model(
        config.name,
        num_classes=num_classes,
        width=config.width,
        stem=config.stem,
        shortcut=config.shortcut,
        plan=plan,
        dtype=jnp.dtype(config.dtype),
        strict=config.strict,
    )


def make_preprocessing(data: Data, stored_shape: tuple[int, int, int]) -> Preprocessing:
    """Returns how the configured data become the network's input.

    Raises:
        ValueError: Mean or deviation do not fit the stored channels.
    """
    sides, channels = stored_shape[:2], stored_shape[2]
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) != channels:
            raise ValueError(
                f"`data.{name}` (={values}) must have {channels} entries, one a "
                f"channel of these images."
            )
    height, width = both_sides(data.image_size or sides)
    shape = (height, width, channels)
    return Preprocessing(shape, data.mean, data.std, data.eval_resize)


def with_classes(model: Any, num_classes: int) -> Any:
    """Returns a network with another number of classes."""
    if isinstance(model, OwnNetwork):
        return make_own_network(model.factory, num_classes=num_classes, plan=model.plan)
    return model.clone(num_classes=num_classes)


def with_dtype(model: Any, dtype: Any) -> Any:
    """Returns a network that computes in another type.

    Raises:
        ValueError: A network of the user's own has no field `dtype`.
    """
    if not isinstance(model, OwnNetwork):
        return model.clone(dtype=dtype)
    if model.dtype == dtype:
        return model
    inner: Any = model.unplanned
    if not hasattr(inner, "dtype"):
        raise ValueError(
            f"`dtype` (={jnp.dtype(dtype)}) must be {model.dtype}: "
            f"{type(inner).__name__} has no field `dtype`."
        )
    return model.clone(unplanned=inner.clone(dtype=dtype))


def model_config(model: Any, *, strict: bool = False) -> Model:
    """Returns the configuration that makes a network."""
    if isinstance(model, OwnNetwork):
        return Model(factory=model.factory, plan=model.plan.to_json(), strict=strict)
    return Model(
        name=model_name(model),
        width=model.width,
        stem=getattr(model, "stem", Model.stem),
        shortcut=getattr(model, "shortcut", Model.shortcut),
        dtype=np.dtype(model.dtype).name,
        plan=model.plan.to_json(),
        strict=strict,
    )


def from_checkpoint(
    config: Config, network: NetworkDescription, *, keep_data: bool
) -> Config:
    """Returns the configuration that trains a checkpoint's network further.

    Args:
        config: Everything but network, data and normalisation.
        network: The network, from whose checkpoint training starts.
        keep_data: Keep the configured data and augmentation, not the checkpoint's.
    """
    model, preprocessing = network.model, network.preprocessing
    trained_on = network.trained_on
    # An imported network does not say whether its images were resized.
    image_size: int | tuple[int, int] | None = preprocessing.image_shape[:2]
    if trained_on is not None and "image_size" in network.recorded_data:
        image_size = trained_on.image_size
    data = config.data
    if not keep_data:
        data = trained_on or Data(source="")
        # As any other training has it.
        defaults = {name: getattr(Data, name) for name in network.unknown_augmentation}
        data = dataclasses.replace(data, **defaults)
    return dataclasses.replace(
        config,
        init=str(network.path.absolute()),
        model=model_config(
            model, strict=config.model.strict and bool(model.plan.rules)
        ),
        data=dataclasses.replace(
            data,
            mean=preprocessing.mean,
            std=preprocessing.std,
            image_size=image_size,
            eval_resize=preprocessing.resize,
        ),
    )
