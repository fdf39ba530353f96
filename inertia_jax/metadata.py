"""The description of a checkpoint beside its arrays: `metadata.json`."""

import contextlib
import dataclasses
import json
import math
import operator
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from inertia_jax.atomic import local_path
from inertia_jax.compression.planned import Planned
from inertia_jax.intercept import Wrapper
from inertia_jax.json_values import check_class_names, jsonable
from inertia_jax.models.create import create_model, known_name
from inertia_jax.plan.plan import Plan, plan_of

_FORMAT = 1
_FIELDS = {"model", "plan", "preprocessing", "class_names", "info"}
_MODEL_OPTIONS = ("num_classes", "width", "stem", "shortcut")
# What a reader of JSON meets that somebody edited.
_OF_ANOTHER_FORM = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)
_MOST_LETTERS = 500
# Of a model of others: what makes it, if its maker says so.
_OWN_OPTIONS = ("factory", "num_classes")


def both_sides(sides: int | Sequence[int]) -> tuple[int, int]:
    """Returns height and width, of which one number is both.

    Raises:
        ValueError: There are neither one nor two numbers, or they are no integers.
    """
    pair: tuple[Any, ...] = (sides, sides)
    if isinstance(sides, Sequence) and not isinstance(sides, str):
        pair = tuple(sides)
    if len(pair) != 2:
        raise ValueError(f"`sides` (={sides!r}) must be one number, or two.")
    try:
        return operator.index(pair[0]), operator.index(pair[1])
    except TypeError as error:
        raise ValueError(f"`sides` (={sides!r}) must be integers.") from error


def shortest_sides(sides: int | Sequence[int]) -> int | tuple[int, int]:
    """Returns height and width, or one number where they are equal."""
    height, width = both_sides(sides)
    return height if height == width else (height, width)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become the network's input: `(pixels / 255 - mean) / std`.

    Attributes:
        image_shape: The shape [h, w, c] of the network's input.
        mean: The mean of each channel, of pixels in [0, 1].
        std: The standard deviation of each channel, of pixels in [0, 1].
        resize: Height and width that images are resized to cover, their shape kept,
            before the centre is cut out. One number is both: the short side of any
            image. None: the input's own, so that nothing is cut from images of its
            shape.

    Raises:
        ValueError: Entries that do not fit the channels or are not finite, or a
            `resize` below the input's sides.

    Example:
        >>> ij.Preprocessing(
        ...     image_shape=(28, 28, 1), mean=(0.13,), std=(0.31,)
        ... ).image_shape
        (28, 28, 1)
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("image_shape", operator.index),
            ("mean", float),
            ("std", float),
        ):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, tuple(map(kind, given)))
            except TypeError as error:
                raise ValueError(f"`{name}` (={given!r}) must be numbers.") from error
        height, width, channels = self.image_shape
        if min(self.image_shape) < 1:
            raise ValueError(f"`image_shape` (={self.image_shape}) must be >= 1.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != channels:
                raise ValueError(
                    f"`{name}` (={values}) must have {channels} entries, one a channel."
                )
            if not all(map(math.isfinite, values)):
                raise ValueError(f"`{name}` (={values}) must be finite.")
        if min(self.std) <= 0:
            raise ValueError(f"`std` (={self.std}) must be > 0.")
        if self.resize is not None:
            # Equal settings are equal values, however they were written.
            object.__setattr__(self, "resize", shortest_sides(self.resize))
        resized = self.resized_sides
        if resized[0] < height or resized[1] < width:
            raise ValueError(
                f"`resize` (={self.resize}) must be at least the input's {height} x "
                f"{width} pixels (one number is both height and width), or None."
            )

    @property
    def resized_sides(self) -> tuple[int, int]:
        """Height and width that images cover before the centre is cut out."""
        return both_sides(self.image_shape[:2] if self.resize is None else self.resize)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The description of a checkpoint beside its arrays.

    Attributes:
        preprocessing: How images become the network's input.
        class_names: A name for each class, or none at all.
        info: Further facts, e.g. step, metrics and configuration, as JSON.
        network: The network's name, or the qualified name of the class of another's
            model. `save_checkpoint` writes it, whatever is here.

    Example:
        >>> about = ij.Metadata(
        ...     ij.Preprocessing(image_shape=(28, 28, 1), mean=(0.13,), std=(0.31,)),
        ...     class_names=tuple("0123456789"),
        ... )
        >>> about.preprocessing.mean
        (0.13,)
    """

    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: str = dataclasses.field(default="", compare=False)


# A function of what a checkpoint says of a model of others, and of its metadata.
MakeModel = Callable[[Mapping[str, Any], Metadata], nn.Module]


def describe(model: nn.Module, metadata: Metadata) -> str:
    """Returns the text of `metadata.json`.

    Raises:
        ValueError: `model` stands around a network that can be trained further, or is
            no Linen model, or has another number of classes than `metadata`, whose
            names are not all text.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` (={type(model).__name__}) must be a Linen model. An nnx.Module "
            f"is read as one, with its variables, by `ij.nnx.as_linen(module)`."
        )
    if (num_classes := getattr(model, "num_classes", None)) is not None:
        _check_num_names(metadata, num_classes)
    check_class_names(metadata.class_names)
    told = dataclasses.asdict(metadata)
    del told["network"]
    description = {
        "format": _FORMAT,
        "model": _describe_model(model),
        "plan": json.loads((plan_of(model) or Plan()).to_json()),
        **told,
    }
    return json.dumps(description, indent=1, default=jsonable)


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """Returns what a network of this library is made of, or the class of another."""
    name = known_name(model)
    options = _OWN_OPTIONS if name is None else _MODEL_OPTIONS
    inner = model.unplanned if isinstance(model, Planned) else model
    given = {o: getattr(model, o, getattr(inner, o, None)) for o in options}
    told = {o: v for o, v in given.items() if isinstance(v, (int, float, str))}
    if name is not None:
        return {"name": name, "dtype": np.dtype(model.dtype).name, **told}
    kept: tuple[tuple[str, str], ...] = ()
    if isinstance(model, Planned):
        model, kept = model.unplanned, model.kept
    if isinstance(model, Wrapper):
        raise ValueError(
            f"`model` (={type(model).__name__}) must be a network that can be trained "
            f"further: save the one inside, and fold what `load_checkpoint` returns."
        )
    return {"class": class_name(model), "kept": kept, **told}


def class_name(model: nn.Module) -> str:
    """Returns the qualified name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def load_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Reads the description of a checkpoint; does not check the hashes.

    Args:
        path: The checkpoint, or a run, of which the best checkpoint is taken.

    Raises:
        FileNotFoundError: There is no checkpoint at `path`.
        ValueError: Its description is broken, or of another version.

    Example:
        >>> ij.save_checkpoint("checkpoints/named", model, variables)
        >>> ij.load_metadata("checkpoints/named").network
        'lenet'
    """
    path = find_checkpoint(path)
    return _make_metadata(path, _read_description(path))


def load_description(
    path: str | os.PathLike[str], make: MakeModel | None = None
) -> tuple[nn.Module, Metadata]:
    """Reads the network, with its plan, and its description, but no arrays.

    Args:
        path: The checkpoint.
        make: A function of what is known of a model that is none of this library's
            (`class`, `kept`, and `factory` and `num_classes` where they were saved),
            and of the checkpoint's metadata. It returns the model, whose own plan does
            not matter. Networks of this library are made without it.

    Raises:
        FileNotFoundError: There is no checkpoint at `path`.
        ValueError: Its description is broken, or of another version, or there is no
            `make` where it is needed.
    """
    description = _read_description(path)
    metadata = _make_metadata(path, description)
    with _broken(path):
        plan = Plan.from_json(json.dumps(description["plan"]))
        about = {**description["model"]}
        if "class" not in about:
            model = create_model(plan=plan, **about)
            _check_num_names(metadata, model.num_classes)
            return model, metadata
        kept = tuple((str(layer), str(why)) for layer, why in about["kept"])
    if make is None:
        raise ValueError(
            f"{path} has a {about['class']}, which is none of this library's networks: "
            f"give one as `model`, with any or no plan."
        )
    model = make(about, metadata)
    if plan_of(model) is None:
        if not plan.rules and not kept:
            return model, metadata
        model = Planned(model)
    model = model.clone(plan=plan)
    return model.clone(kept=kept) if isinstance(model, Planned) else model, metadata


def checkpoint_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Returns where the checkpoint of a step lies in a run's `checkpoints`."""
    return directory / f"step_{step:08d}"


def latest_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps that have a checkpoint, in order."""
    if not directory.is_dir():
        return []
    # Names that `checkpoint_path` does not give, such as `step_5`, are no checkpoints.
    name = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
    found = (name.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in found if match)


def best_step(directory: pathlib.Path) -> int | None:
    """Returns the earliest step of the highest evaluated top-1.

    It is that on validation images where a run has some, and else on test images.
    """
    best: tuple[float, int] | None = None
    for step in latest_steps(directory):
        try:
            info = load_metadata(checkpoint_path(directory, step)).info
            evaluation = info.get("validation") or info.get("evaluation")
            if not evaluation:
                continue  # saved inside an epoch
            top1 = float(evaluation["top1"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged
        if best is None or top1 > best[0]:
            best = (top1, step)
    return best[1] if best else None


def find_checkpoint(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a checkpoint: `path` itself, or a run's best, or its latest.

    Raises:
        FileNotFoundError: There is neither a checkpoint nor a run at `path`.
    """
    path = local_path(pathlib.Path(path).expanduser())
    if (path / "arrays").is_dir() or (path / "metadata.json").is_file():
        return path
    directory = path if path.name == "checkpoints" else path / "checkpoints"
    steps = latest_steps(directory)
    if not steps:
        raise FileNotFoundError(
            f"there is no checkpoint at {path}, and no run that has one."
        )
    best = best_step(directory)
    return checkpoint_path(directory, best if best is not None else steps[-1])


def _make_metadata(
    path: str | os.PathLike[str], description: dict[str, Any]
) -> Metadata:
    preprocessing = None
    with _broken(path):
        if description["preprocessing"]:
            fields = description["preprocessing"]
            height, width, channels = map(operator.index, fields["image_shape"])
            resize = fields["resize"]
            preprocessing = Preprocessing(
                image_shape=(height, width, channels),
                mean=tuple(map(float, fields["mean"])),
                std=tuple(map(float, fields["std"])),
                resize=None if resize is None else shortest_sides(resize),
            )
        names, info = tuple(description["class_names"]), dict(description["info"])
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"`class_names` (={names}) must be names.")
    about = description["model"]
    network = about.get("class") or about.get("name") if isinstance(about, dict) else ""
    return Metadata(preprocessing, names, info, str(network or ""))


def _check_num_names(metadata: Metadata, num_classes: int) -> None:
    found = len(metadata.class_names)
    if found not in (0, num_classes):
        raise ValueError(f"{found} `class_names` must be {num_classes}, or none.")


@contextlib.contextmanager
def _broken(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a description of another form leads to into one error."""
    try:
        yield
    except _OF_ANOTHER_FORM as error:
        why = str(error) or type(error).__name__
        if not isinstance(error, ValueError):
            why = f"{type(error).__name__}: {why}"
        raise ValueError(
            f"{path} has a broken metadata.json: {why[:_MOST_LETTERS]}"
        ) from error


def _read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = local_path(path) / "metadata.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        description = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(description, dict):
        raise ValueError(f"{file} describes no checkpoint.")
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {description.get('format')!r:.100}; must be {_FORMAT}."
        )
    missing = sorted(_FIELDS - set(description))
    if missing:
        raise ValueError(f"{file} lacks {missing}.")
    return description
