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
    """

    init: Array
    order: Array
    steps: Array


def run_keys(seed: int) -> RunKeys:
    """Returns the keys of a run."""
    init, order, steps = jax.random.split(jax.random.key(seed), 3)
    return RunKeys(init, order, steps)
