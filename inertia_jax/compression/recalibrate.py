"""BatchNorm recalibration: new running statistics for a network that has changed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Shaped

from inertia_jax.calls import ApplyFn
from inertia_jax.compression.calibration import (
    apply_as_trained,
    batch_norm_paths,
)
from inertia_jax.inputs import batched, num_inputs
from inertia_jax.layers.inertial import FRICTION_MEAN
from inertia_jax.ops.precision import at_least_float32
from inertia_jax.variables import plain_variables

_Stats = dict[tuple[str, ...], Any]
# A start beside which the statistics of no batch count, in the numbers of float32.
_FAR = 2.0**60


def recalibrate_batch_norm(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Shaped[ArrayLike, "n *image"] | Mapping[str, Any],
    *,
    batch_size: int = 128,
    apply_fn: ApplyFn | None = None,
) -> dict[str, Any]:
    """Returns variables whose running statistics are measured anew on `images`.

    The statistics are `mean` and `var` of BatchNorm, and the mean of relative friction.
    While they are measured, every layer normalises with its batch's own statistics, as
    in training. Statistics that training does not move (`use_running_average=True`) are
    used, and kept. Means are averaged over the batches. Variances are those of all
    images together: the mean variance inside batches plus the variance of their means.
    They are measured in float32 or wider and stored in the type that they had.

    The images must be as in training, cropped and mirrored. Plain ones cost a CIFAR-10
    ResNet20 four points, although nothing else in it has changed.

    Args:
        model: The network.
        variables: Its variables; all others are kept, also those that other modules
            have in `batch_stats`.
        images: The network's inputs, augmented and normalised as in training; images
            that fill no whole batch are left out.
        batch_size: Images per batch, >= 2.
        apply_fn: How the network is called, as in `compress`.

    Raises:
        ValueError: No running statistics, fewer than two images, statistics that are
            not finite, or a network that takes no argument by which it would be told
            that it is trained.

    Example:
        >>> from flax import linen as nn
        >>> network = nn.BatchNorm(use_running_average=None)
        >>> first = network.init(jax.random.key(0), images, use_running_average=True)
        >>> measured = ij.recalibrate_batch_norm(network, first, images)
        >>> jnp.allclose(measured["batch_stats"]["mean"], images.mean()).item()
        True

    References:
        Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167, algorithm 2
    """
    variables = plain_variables(variables)
    paths = running_statistics(variables)
    if not paths:
        raise ValueError(
            "`variables` has no `batch_stats` of BatchNorm; nothing to recalibrate."
        )
    images = images if isinstance(images, Mapping) else np.asarray(images)
    number = num_inputs(images)
    if batch_size < 2 or number < 2:
        raise ValueError(
            f"`batch_size` (={batch_size}) and the number of `images` "
            f"(={number}) must be >= 2."
        )
    stored = traverse_util.flatten_dict(variables["batch_stats"])
    old = {path: np.asarray(stored[path]) for path in paths}

    @jax.jit
    def after_a_step(start: _Stats, variables: Any, batch: Any) -> _Stats:
        stats = traverse_util.unflatten_dict({**stored, **start})
        _, changed = apply_as_trained(
            model,
            {**variables, "batch_stats": stats},
            batch,
            train=True,
            apply_fn=apply_fn,
        )
        moved = traverse_util.flatten_dict(dict(changed["batch_stats"]))
        return {path: moved[path] for path in start}

    measured = _measured(
        lambda start, batch: jax.device_get(after_a_step(start, variables, batch)),
        {path: leaf.astype(at_least_float32(leaf.dtype)) for path, leaf in old.items()},
        batched(images, batch_size),
    )
    stacked = {path: np.stack([stats[path] for stats in measured]) for path in paths}
    new = {}
    for path, values in stacked.items():
        found = values.mean(0, dtype=np.float64)
        if path[-1] == "var":
            found += stacked[*path[:-1], "mean"].var(0, dtype=np.float64)
        new[path] = jnp.asarray(found.astype(old[path].dtype))
    if not all(np.isfinite(value).all() for value in new.values()):
        raise ValueError("the statistics of `images` must be finite; some are not.")
    return {**variables, "batch_stats": traverse_util.unflatten_dict({**stored, **new})}


def running_statistics(variables: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """Returns the paths in `batch_stats` of the statistics that are recalibrated."""
    stats = traverse_util.flatten_dict(dict(variables.get("batch_stats", {})))
    frictions = {path for path in stats if path[-1] == FRICTION_MEAN}
    return batch_norm_paths(variables) | frictions


def _measured(
    after_a_step: Callable[[_Stats, Any], _Stats],
    old: _Stats,
    batches: list[Any],
) -> list[_Stats]:
    """Returns the statistics of each batch, or the old ones where no step moves them.

    A step moves statistics s to a s + (1 - a) b, where b are the batch's own. From far
    away it gives a, so that no layer need say its momentum.
    """

    def starts(moves: _Stats, start: float) -> _Stats:
        # A layer that does not move its statistics computes with them.
        return jax.tree.map(
            lambda m, s: np.where(m, np.asarray(start, s.dtype), s), moves, old
        )

    everything = jax.tree.map(lambda s: np.ones(s.shape, bool), old)
    seen = after_a_step(starts(everything, _FAR), batches[0])
    moves = jax.tree.map(lambda s: s != _FAR, seen)
    seen = after_a_step(starts(moves, _FAR), batches[0])
    steps = jax.tree.map(lambda m, s: np.where(m, 1 - s / _FAR, 1), moves, seen)
    start = starts(moves, 0)
    return [
        jax.tree.map(np.divide, after_a_step(start, batch), steps) for batch in batches
    ]
