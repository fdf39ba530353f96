"""The names of image sets, and the kind that is left out where it is plain."""

import os
import pathlib
import re
from typing import Annotated

import tyro

from inertia_jax.ops.inertial.settings import near_miss

KINDS = ("imagefolder", "npz", "tfds")
# The sets of TFDS that are called by their bare names. TFDS knows thousands, but its
# list takes seconds to import.
_WELL_KNOWN = (
    *("caltech101", "cats_vs_dogs", "cifar10", "cifar100", "emnist", "eurosat"),
    *("fashion_mnist", "food101", "imagenet2012", "imagenet_resized", "imagenette"),
    *("kmnist", "mnist", "oxford_flowers102", "oxford_iiit_pet", "places365_small"),
    *("stanford_dogs", "stl10", "svhn_cropped", "tf_flowers"),
)


def complete_source(source: str) -> str:
    """Returns a source with its kind, where that was left out and can be one alone.

    A folder that is there is an `imagefolder:PATH`, a path that ends in `.npz` is an
    `npz:PATH`, and the name of a well-known set of TFDS is `tfds:NAME`. What may be
    more than one of them, or none, is returned as it is.
    """
    found = _candidates(source)
    return found[0] if len(found) == 1 else source


def describe_near(source: str) -> str:
    """Returns what a source that is of no known kind may have been meant for."""
    found = _candidates(source)
    if found:
        return f" Is it {' or '.join(found)}?"
    if source.startswith(("/", "./", "../", "~")):
        return f" There is nothing at {source}."
    kind, colon, _ = source.partition(":")
    if kind in KINDS:
        return ""
    if colon:
        return near_miss(kind, KINDS)
    sets = (f"tfds:{name}" for name in _WELL_KNOWN)
    return near_miss(source, ("digits", *KINDS, *sets))


def _candidates(source: str) -> list[str]:
    kind, _, rest = source.partition(":")
    if source in ("", "digits") or (kind in KINDS and rest):
        return []
    found = []
    if pathlib.Path(source).suffix == ".npz":
        found.append(f"npz:{source}")
    # These functions of `os.path`, unlike pathlib's, take users that there are not and
    # names that are too long.
    if os.path.isdir(os.path.expanduser(source)):
        found.append(f"imagefolder:{source}")
    if re.split("[:/]", source)[0] in _WELL_KNOWN and not source.endswith("/"):
        found.append(f"tfds:{source}")
    return found


def _spelt(words: list[str]) -> str:
    return complete_source(words[0])


# The type of an option that names an image set.
Source = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=_spelt,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
