"""The keys that every random number of a run comes from, one for each purpose."""

from typing import NamedTuple

import jax
from jax import Array


class RunKeys(NamedTuple):
    """Keys that share nothing but the seed.

    Attributes:
        init: Key of the first parameters.
        order: Key of the examples' order, folded with the epoch.
        steps: Key of augmentation and dropout, folded with the step of the run.
        mirrors: Key of the side that alternating mirrors begin with.
    """

    init: Array
    order: Array
    steps: Array
    mirrors: Array


def run_keys(seed: int) -> RunKeys:
    """Returns the keys of a run."""
    # Append new purposes: the first n keys do not depend on how many are split.
    return RunKeys(*jax.random.split(jax.random.key(seed), 4))
