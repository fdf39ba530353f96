"""Names of classes, of data and of checkpoints."""

import sys

import jax

from inertia_jax.metadata import Metadata
from train.data import ImageSet


def warn_of_other_names(data: ImageSet, metadata: Metadata) -> None:
    """Says on standard error where data name a class otherwise than a checkpoint."""
    theirs = metadata.class_names
    pairs = list(zip(data.class_names, theirs, strict=False))
    numbers = [(str(i), str(i)) for i in range(len(pairs))]
    named = all(
        [pair[side] for pair in pairs] != [pair[side] for pair in numbers]
        for side in (0, 1)
    )
    for label, (ours, name) in enumerate(pairs):
        if named and ours != name and jax.process_index() == 0:
            print(
                f"warning: label {label} is {ours!r} in {data.name} and {name!r} in "
                f"the checkpoint.",
                file=sys.stderr,
            )
            return
