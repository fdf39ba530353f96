"""`python -m train import`: make a checkpoint from weights of PyTorch or Flax."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from inertia_jax import count_cost, match_torch, save_checkpoint
from inertia_jax.interop import read_torch
from inertia_jax.metadata import Metadata, Preprocessing, both_sides
from inertia_jax.models.create import abstract_variables, input_shape
from inertia_jax.models.names import check_model_name
from train.config import Model
from train.errors import UsageError, user_input
from train.machine.processes import say
from train.networks import make_model
from train.options.import_torch import Import, parse
from train.own_network import check_own_network
from train.result import add_result

# Options that say which network of this library it is, and how one of others is paired.
_OF_LIBRARY = ("width", "stem", "shortcut", "ema")
_OF_OTHERS = ("pairs", "flattened", "unflattened")


def parse_pairs(name: str, pairs: Sequence[str], *, example: str) -> dict[str, str]:
    """Returns the right sides of `LEFT=RIGHT` by the left ones.

    Args:
        name: The option.
        pairs: Its words.
        example: Such a pair, for the error.

    Raises:
        ValueError: A pair has no `=`, nothing before it, or the left side of another.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        left, equals, right = pair.partition("=")
        if not left or not equals:
            raise ValueError(f"`{name}` (={pair!r}) must be {example}.")
        if left in found:
            raise ValueError(f"`{name}` (={pair!r}) has a second name for {left!r}.")
        found[left] = right
    return found


def _parse_shapes(name: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Returns shapes of images, or None, by the layers of `LAYER=SHAPE`."""
    example = "LAYER=SHAPE, e.g. Dense_0=7x7x64 or Dense_0=None"
    shapes: dict[str, Any] = {}
    for layer, shape in parse_pairs(name, pairs, example=example).items():
        sides = shape.split("x")
        if shape != "None" and not all(map(str.isdecimal, sides)):
            raise ValueError(f"`{name}` (='{layer}={shape}') must be {example}.")
        shapes[layer] = None if shape == "None" else tuple(map(int, sides))
    return shapes


def _check_options(args: Import) -> None:
    """Raises UsageError where options contradict each other."""
    if (args.model is None) == (args.factory is None):
        raise UsageError(
            f"`model` (={args.model}) or `model.factory` (={args.factory}) must be "
            f"given, and one of them alone."
        )
    needed = "model.factory" if args.factory is None else "model"
    for name in _OF_OTHERS if args.factory is None else _OF_LIBRARY:
        if getattr(args, name) != getattr(Import, name):
            raise UsageError(
                f"`{name}` (={getattr(args, name)}) does nothing without `{needed}`."
            )
    if args.factory is not None and args.image_size is None:
        raise UsageError(
            "`image_size` (=None) must be given with `model.factory`: the network does "
            "not say the height and width of its input."
        )


def _read_weights(
    args: Import, model: Any, shape: tuple[int, int, int]
) -> tuple[dict[str, Any], str]:
    """Returns variables with the weights of the file, and what is to be said of it."""
    rename = parse_pairs("rename", args.rename, example="OLD=NEW, e.g. top=linear")
    if args.factory is None:
        variables, note = read_torch(
            model,
            args.weights,
            image_shape=shape,
            ema=args.ema,
            rename=rename,
            dtype=np.float32,
        )
        return variables, f"{note}." if note else ""
    match = match_torch(
        abstract_variables(model, shape),
        args.weights,
        pairs=parse_pairs(
            "pairs", args.pairs, example="OURS=THEIRS, e.g. Block_2=layer2.0"
        ),
        rename=rename,
        flattened=_parse_shapes("flattened", args.flattened),
        unflattened=_parse_shapes("unflattened", args.unflattened),
    )
    return match.variables, str(match)


def run(argv: Sequence[str]) -> int:
    """Imports as the arguments say, and prints where the checkpoint is."""
    args = parse(argv)
    out = pathlib.Path(args.out).expanduser()
    if out.exists():
        raise UsageError(f"`out` (={out}) must not exist; it was left as it is.")
    # The warning of `fit` on other statistics than the images' would come too late.
    for name in ("mean", "std"):
        if max(getattr(args, name), default=0) > 1:
            raise UsageError(
                f"`{name}` (={getattr(args, name)}) must be at most 1: pixels are in "
                f"[0, 1] here; divide what is of 0 to 255 by 255."
            )
    _check_options(args)
    say(f"reading {args.weights}")
    with user_input():
        name = args.model or Model.name
        check_model_name("model", name)
        network = Model(name, args.factory, args.width, args.stem, args.shortcut)
        model = make_model(network, num_classes=args.num_classes)
        if args.class_names and len(args.class_names) != args.num_classes:
            raise ValueError(
                f"`class_names` has {len(args.class_names)} entries; must have "
                f"{args.num_classes}."
            )
        given = args.image_size
        height, width = input_shape(model)[:2] if given is None else both_sides(given)
        if min(height, width) < 1:
            raise ValueError(f"`image_size` (={given}) must be >= 1.")
        shape = (height, width, len(args.mean))
        preprocessing = Preprocessing(shape, args.mean, args.std, args.resize)
        if args.factory is not None:
            check_own_network(model, shape, strict=False)
        variables, note = _read_weights(args, model, shape)
        metadata = Metadata(
            preprocessing, args.class_names, {"imported_from": args.weights}
        )
        save_checkpoint(out, model, variables, metadata=metadata)
    if note:
        print(note)
    cost = count_cost(model, shape)
    name = args.factory or name
    print(f"{name}: {cost.params:,} parameters, {cost.macs:,} MACs an image")
    print(f"checkpoint  {out}")
    add_result({"checkpoint": out, "params": cost.params, "macs": cost.macs})
    return 0
