"""The optimiser and its learning rate, in PyTorch's order of operations."""

import dataclasses
from typing import Any

import optax
from flax import traverse_util

from train.config import Optimizer


def scale_learning_rate(config: Optimizer, *, batch_size: int) -> Optimizer:
    """Returns the optimiser with `learning_rate * batch_size / base_batch_size`.

    References:
        Goyal et al., 2017, https://arxiv.org/abs/1706.02677, section 2.1
    """
    if config.base_batch_size is None:
        return config
    rate = config.learning_rate * batch_size / config.base_batch_size
    return dataclasses.replace(config, learning_rate=rate, base_batch_size=batch_size)


def make_schedule(
    config: Optimizer, *, steps_per_epoch: int, epochs: int
) -> optax.Schedule:
    """Returns the learning rate of each step, counted from 0."""
    steps = steps_per_epoch * epochs
    if config.schedule == "one_cycle":
        peak = max(1, round(config.peak_share * steps))
        rise = optax.linear_schedule(0.0, config.learning_rate, peak)
        fall = optax.linear_schedule(config.learning_rate, 0.0, max(1, steps - peak))
        return optax.join_schedules([rise, fall], [peak])
    warmup = steps_per_epoch * config.warmup_epochs
    if config.schedule == "multistep":
        factors = {steps_per_epoch * e: config.decay for e in config.milestones}
        schedule = optax.piecewise_constant_schedule(config.learning_rate, factors)
    elif config.schedule == "cosine":
        falling = max(1, steps - warmup)
        schedule = optax.cosine_decay_schedule(config.learning_rate, falling)
    else:
        schedule = optax.exponential_decay(
            config.learning_rate,
            steps_per_epoch * config.decay_epochs,
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
    # Thresholds are levels: decaying them towards 0 has no meaning.
    spared = {"threshold"}
    if not config.decay_norm_and_bias:
        spared |= {"scale", "bias"}

    def is_decayed(params: Any) -> Any:
        return traverse_util.path_aware_map(lambda p, _: p[-1] not in spared, params)

    decay = optax.add_decayed_weights(config.weight_decay, mask=is_decayed)
    return optax.chain(decay, update)
