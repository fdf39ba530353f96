"""The optimiser and its learning rate, in PyTorch's order of operations."""

from typing import Any

import jax
import optax

from train.config import Optimizer


def make_schedule(
    config: Optimizer, *, steps_per_epoch: int, epochs: int
) -> optax.Schedule:
    """Returns the learning rate of each step, counted from 0."""

    def by_epoch(epoch: int) -> int:
        return epoch * steps_per_epoch

    warmup = by_epoch(config.warmup_epochs)
    if config.schedule == "multistep":
        factors = {by_epoch(e): config.decay for e in config.milestones}
        schedule = optax.piecewise_constant_schedule(config.learning_rate, factors)
    elif config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(
            config.learning_rate, max(1, by_epoch(epochs) - warmup)
        )
    else:
        schedule = optax.exponential_decay(
            config.learning_rate,
            by_epoch(config.decay_epochs),
            config.decay,
            staircase=True,
        )
    if not warmup:
        return schedule
    if config.schedule != "cosine":  # milestones count from the first step of all
        unshifted = schedule
        schedule = lambda step: unshifted(step + warmup)  # noqa: E731
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, schedule], [warmup])


def make_optimizer(
    config: Optimizer, *, steps_per_epoch: int, epochs: int
) -> optax.GradientTransformation:
    """Returns the optimiser; weight decay comes first, as `torch.optim` has it."""
    schedule = make_schedule(config, steps_per_epoch=steps_per_epoch, epochs=epochs)
    if config.name == "sgd":
        update = optax.sgd(schedule, config.momentum or None, config.nesterov)
    else:
        update = optax.adadelta(schedule, rho=0.9, eps=1e-6)
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_decayed)
    return optax.chain(decay, update)


def _is_decayed(params: Any) -> Any:
    """Marks what weight decay pulls to zero: all but thresholds, which are levels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) != "threshold",
        params,
    )
