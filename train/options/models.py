"""The options of `python -m train models`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from train.arguments import parse_options


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the networks with their parameters and multiply-accumulates (MACs).

    MACs are those of one image of the shape that the network was published for. With a
    NAME, it shows the layers of that network.
    """

    name: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")
    ] = None
    """Network whose layers are shown; None: all networks, a line each."""
    num_classes: int = 10
    """Number of classes."""
    width: float = 1.0
    """Factor of every number of channels."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers of resnet18; the other goes with a NAME."""
    shortcut: Literal["A", "B"] = "A"
    """Shortcuts of resnet20 to resnet56; the other goes with a NAME."""


def parse(argv: Sequence[str]) -> Models:
    """Reads the words after the verb."""
    return parse_options(Models, argv, verb="models")
