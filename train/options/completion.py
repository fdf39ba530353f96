"""The options of `python -m train completion`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from train.arguments import parse_options


@dataclasses.dataclass(frozen=True)
class Completion:
    """Prints a script that completes `inertia`'s verbs, options and their values.

    For bash, write it to ~/.local/share/bash-completion/completions/inertia. For zsh,
    write it to a file `_inertia` in a folder of $fpath.
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Shell that reads the script."""


def parse(argv: Sequence[str]) -> Completion:
    """Reads the words after the verb."""
    return parse_options(Completion, argv, verb="completion")
