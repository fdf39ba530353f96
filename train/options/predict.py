"""The options of `python -m train predict`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.config import CheckpointArgument, FactoryOption
from train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Predict:
    """Says which classes a checkpoint's network sees in images.

    Images are prepared as those of its evaluation: resized to cover the network's
    input, their centre cut out, normalised.
    """

    checkpoint: CheckpointArgument
    """Checkpoint, or run, of which the best checkpoint is taken."""
    images: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]"),
    ]
    """Files of images, of any raster format that Pillow decodes by itself."""
    top: int = 5
    """Number of classes that are shown, the most probable ones."""
    batch_size: int = 64
    """Images a call."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    out: str | None = None
    """File to which classes and probabilities are written, as JSON."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` (={getattr(self, name)}) must be >= 1.")


def parse(argv: Sequence[str]) -> Predict:
    """Reads the words after the verb."""
    args = parse_options(Predict, argv, verb="predict")
    if not args.images:
        raise UsageError("`images` must have at least one file.")
    return args
