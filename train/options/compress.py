"""The options of `python -m train compress`."""

from collections.abc import Sequence

from train.arguments import parse_options
from train.compress.options import Compress


def parse(argv: Sequence[str]) -> Compress:
    """Reads the words after the verb."""
    return parse_options(Compress, argv, verb="compress")
