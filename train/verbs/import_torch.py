"""`python -m train import`: make a checkpoint from weights of PyTorch or Flax."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import tyro

from inertia_jax import count_cost, create_model, save_checkpoint
from inertia_jax.interop import read_torch
from inertia_jax.metadata import Metadata, Preprocessing, both_sides
from inertia_jax.models.create import check_model_name, input_shape
from train.arguments import parse_options
from train.errors import UsageError, user_input
from train.machine.processes import say


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a checkpoint from weights of PyTorch or Flax."""

    weights: Annotated[str, tyro.conf.Positional]
    """File that torch.save, safetensors or flax.serialization wrote, whatever its name,
    the JSON index of several files, or a folder of orbax. What is narrower than float32
    becomes float32."""
    out: str
    """Directory of the checkpoint, which must not exist."""
    model: str
    """lenet, resnet18/20/32/44/56, simpledla or vgg16."""
    mean: tuple[float, ...]
    """Mean of each channel with which inputs were normalised, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel with which inputs were normalised."""
    num_classes: int = 10
    """Number of classes."""
    width: float = 1.0
    """Factor of every number of channels."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers of resnet18."""
    shortcut: Literal["A", "B"] = "A"
    """Shortcuts of resnet20 to resnet56: padded, or 1x1 convolutions."""
    image_size: int | tuple[int, int] | None = None
    """Height and width of the network's input; one number: both; None: the published
    ones."""
    resize: int | tuple[int, int] | None = None
    """Height and width that images are resized to cover before the centre is cut out;
    one number: both; None: those of the input."""
    class_names: tuple[str, ...] = ()
    """Name of each class."""
    ema: bool = False
    """Whether averaged weights are taken, of a file that has both."""
    rename: tuple[str, ...] = ()
    """Parts of keys that have another name in the file, as OLD=NEW: `top=linear`,
    `conv*_x=layer*`."""


def parse_renames(pairs: Sequence[str]) -> dict[str, str]:
    """Returns the new names by the old ones of `OLD=NEW`.

    Raises:
        ValueError: A pair has no `=`, nothing before it, or the old name of another.
    """
    renames: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not old or not equals:
            raise ValueError(f"`rename` (={pair!r}) must be OLD=NEW, e.g. top=linear.")
        if old in renames:
            raise ValueError(f"`rename` (={pair!r}) has a second name for {old!r}.")
        renames[old] = new
    return renames


def run(argv: Sequence[str]) -> int:
    """Imports as the arguments say, and prints where the checkpoint is."""
    args = parse_options(Import, argv, verb="import")
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
    say(f"reading {args.weights}")
    with user_input():
        check_model_name("model", args.model)
        model = create_model(
            args.model,
            num_classes=args.num_classes,
            width=args.width,
            stem=args.stem,
            shortcut=args.shortcut,
        )
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
        variables, note = read_torch(
            model,
            args.weights,
            image_shape=shape,
            ema=args.ema,
            rename=parse_renames(args.rename),
            dtype=np.float32,
        )
        metadata = Metadata(
            preprocessing, args.class_names, {"imported_from": args.weights}
        )
        save_checkpoint(out, model, variables, metadata=metadata)
    if note:
        print(f"{note}.")
    cost = count_cost(model, shape)
    print(f"{args.model}: {cost.params:,} parameters, {cost.macs:,} MACs an image")
    print(f"checkpoint  {out}")
    return 0
