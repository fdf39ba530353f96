"""Where every random number of a run comes from: one key a purpose."""

from typing import NamedTuple

import jax
from jax import Array


class RunKeys(NamedTuple):
    """Keys that share nothing but the seed.

    Attributes:
        init: For the first parameters.
        order: For the order of the examples, one fold an epoch.
        steps: For augmentation and dropout, one fold a step of the run.
        mirrors: For which images alternating mirrors begin with.
    """

    init: Array
    order: Array
    steps: Array
    mirrors: Array


def run_keys(seed: int) -> RunKeys:
    """Returns the keys of a run."""
    # The first of them are the same of however many: a purpose is added at the end.
    return RunKeys(*jax.random.split(jax.random.key(seed), 4))
