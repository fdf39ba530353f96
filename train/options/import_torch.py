"""The options of `python -m train import`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from train.arguments import parse_options
from train.config import FactoryOption


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a checkpoint from weights of PyTorch or Flax."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """File that torch.save, safetensors or flax.serialization wrote, whatever its name,
    the JSON index of several files, or a folder of orbax. What is narrower than float32
    becomes float32."""
    out: str
    """Directory of the checkpoint, which must not exist."""
    mean: tuple[float, ...]
    """Mean of each channel with which inputs were normalised, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel with which inputs were normalised."""
    model: Annotated[str | None, tyro.conf.arg(aliases=("--model.name",))] = None
    """lenet, resnet18/20/32/44/56, simpledla or vgg16; None: one of your own."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION, in place of `model`.
    PyTorch's weights are paired with its variables by names and shapes
    (`inertia_jax.match_torch`)."""
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
    ones, which a network of your own has not."""
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
    pairs: tuple[str, ...] = ()
    """Layers or modules of a network of your own, and what they are in the file, as
    OURS=THEIRS: `Block_2=layer2.0`."""
    flattened: tuple[str, ...] = ()
    """Images that linear layers of a network of your own take in one row, as
    LAYER=SHAPE; None for what is no image: `Dense_0=7x7x64`, `*=None`."""
    unflattened: tuple[str, ...] = ()
    """Images that layers of a network of your own make in one row, or that BatchNorm
    has there, as LAYER=SHAPE."""


def parse(argv: Sequence[str]) -> Import:
    """Reads the words after the verb."""
    return parse_options(Import, argv, verb="import")
