"""BatchNorm recalibration: new running statistics for a network that has changed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.compression.calibration import apply_as_trained, batched


def recalibrate_batch_norm(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Float[ArrayLike, "n h w c"],
    *,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Returns variables whose `batch_stats` are measured anew on `images`.

    While they are measured, every layer normalises with its batch's own statistics, as
    in training. Means are averaged over the batches. Variances are those of all images
    together: the mean variance inside batches plus the variance of their means.

    Args:
        model: A network that is called as `model(images, train=True)`.
        variables: Its variables; all but `batch_stats` are kept.
        images: The network's inputs, normalised as in training; images that fill no
            whole batch are left out.
        batch_size: Images per batch, >= 2.

    Raises:
        ValueError: No `batch_stats`, fewer than two images, or statistics that are not
            finite.

    References:
        Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167, algorithm 2
    """
    if not variables.get("batch_stats"):
        raise ValueError("`variables` has no `batch_stats`; nothing to recalibrate.")
    images = np.asarray(images)
    if batch_size < 2 or len(images) < 2:
        raise ValueError(
            f"`batch_size` (={batch_size}) and the number of `images` "
            f"(={len(images)}) must be >= 2."
        )
    batches = batched(images, batch_size)

    @jax.jit
    def after_a_step(start: Any, batch: Any) -> Any:
        start = {**variables, "batch_stats": start}
        return apply_as_trained(model, start, batch, train=True)[1]["batch_stats"]

    # A step moves statistics s to a s + (1 - a) b, where b are the batch's own. The
    # difference of steps from 1 and from 0 is a, so that no layer need say its
    # momentum. On blank images b is small, and the difference is exact.
    old = jax.tree.map(jnp.asarray, variables["batch_stats"])
    zeros = jax.tree.map(jnp.zeros_like, old)
    ones = jax.tree.map(jnp.ones_like, zeros)
    blank = np.zeros_like(batches[0])
    kept = jax.tree.map(
        jnp.subtract, after_a_step(ones, blank), after_a_step(zeros, blank)
    )

    def batch_statistics(moved: Array, kept: Array, old: Array) -> Array:
        # Statistics that training does not move stay as they are.
        return jnp.where(kept < 1, moved / jnp.where(kept < 1, 1 - kept, 1), old)

    measured = [
        jax.tree.map(batch_statistics, after_a_step(zeros, batch), kept, old)
        for batch in batches
    ]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *measured)
    by_path = traverse_util.flatten_dict(stacked)
    stats = {path: values.mean(0) for path, values in by_path.items()}
    for path in stats:
        mean_path = (*path[:-1], "mean")
        if path[-1] == "var" and mean_path in by_path:
            stats[path] = stats[path] + by_path[mean_path].var(0)
    if not all(bool(jnp.isfinite(value).all()) for value in stats.values()):
        raise ValueError("the statistics of `images` must be finite; some are not.")
    return {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}
