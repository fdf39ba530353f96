"""Averages of a network's variables over the steps of its training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


def moving_average(averages: Any, variables: Any, *, decay: float, step: Array) -> Any:
    """Returns `d averages + (1 - d) variables` after a step.

    d = min(decay, (1 + step) / (10 + step)): the poor networks of the first steps are
    soon forgotten.

    Args:
        averages: Before the step.
        variables: After it.
        decay: The highest d, in [0, 1).
        step: Steps taken before, from 0.
    """
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    moved = optax.incremental_update(variables, averages, rate)

    def choose(old: Array, new: Array, mean: Array) -> Array:
        # Rounding must not move what stays: frozen parameters, fixed thresholds.
        return jnp.where(new == old, old, mean.astype(old.dtype))

    return jax.tree.map(choose, averages, variables, moved)
