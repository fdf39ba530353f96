"""The optimiser and its learning rate, in PyTorch's order of operations."""

import dataclasses
from typing import Any

import optax
import optax.contrib
from flax import traverse_util

from train.config import Optimizer

# Optax counts steps in 32 bits.
_MOST_STEPS = 2**31 - 1


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

    def steps_of(epochs: int) -> int:
        return min(steps_per_epoch * epochs, _MOST_STEPS)

    steps = steps_of(epochs)
    if config.schedule == "one_cycle":
        peak = max(1, round(config.peak_share * steps))
        rise = optax.linear_schedule(0.0, config.learning_rate, peak)
        fall = optax.linear_schedule(config.learning_rate, 0.0, max(1, steps - peak))
        return optax.join_schedules([rise, fall], [peak])
    warmup = steps_of(config.warmup_epochs)
    if config.schedule == "multistep":
        factors = {steps_of(e): config.decay for e in config.milestones}
        schedule = optax.piecewise_constant_schedule(config.learning_rate, factors)
    elif config.schedule == "cosine":
        falling = max(1, steps - warmup)
        schedule = optax.cosine_decay_schedule(config.learning_rate, falling)
    else:
        schedule = optax.exponential_decay(
            config.learning_rate,
            steps_of(config.decay_epochs),
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
    """Returns the optimiser.

    Weight decay comes first for sgd and adadelta, as `torch.optim` has it. For the
    others it is decoupled: `learning_rate * weight_decay` of each parameter.

    References:
        Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101 (adamw)
        Chen et al., 2023, https://arxiv.org/abs/2302.06675 (lion)
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon (muon)
        Liu et al., 2025, https://arxiv.org/abs/2502.16982, section 2.2 (the size of
        muon's steps)
    """
    schedule = make_schedule(config, steps_per_epoch=steps_per_epoch, epochs=epochs)
    # Thresholds are levels: decaying them towards 0 has no meaning.
    spared = {"threshold"}
    if not config.decay_norm_and_bias:
        spared |= {"scale", "bias"}

    def is_decayed(params: Any) -> Any:
        return traverse_util.path_aware_map(lambda p, _: p[-1] not in spared, params)

    decay = optax.add_decayed_weights(config.weight_decay, mask=is_decayed)
    if config.name == "sgd":
        update = optax.sgd(schedule, config.momentum or None, config.nesterov)
        return optax.chain(decay, update)
    if config.name == "adadelta":
        return optax.chain(decay, optax.adadelta(schedule, rho=0.9, eps=1e-6))
    return optax.chain(
        _direction(config), decay, optax.scale_by_learning_rate(schedule)
    )


def _direction(config: Optimizer) -> optax.GradientTransformation:
    """Returns the part of an optimiser before decoupled decay and learning rate."""
    if config.name == "lion":
        b1, b2 = config.betas or (0.9, 0.99)
        return optax.scale_by_lion(b1, b2)
    b1, b2 = config.betas or (0.9, 0.999)
    if config.name == "adamw":
        return optax.scale_by_adam(b1, b2)
    # Its own decay would not spare thresholds among the parameters of its adamw, and
    # -1 undoes the sign of a learning rate, which comes later.
    return optax.contrib.muon(
        -1.0,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )


def _matrices(params: Any) -> Any:
    """Returns which parameters muon takes as matrices: kernels, inputs by outputs.

    The others, such as biases, BatchNorm's scales and thresholds, are adamw's.
    """

    def axes(path: Any, leaf: Any) -> Any:
        if path[-1] != "kernel" or leaf.ndim < 2:
            return None
        *inputs, outputs = range(leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), outputs)

    return traverse_util.path_aware_map(axes, params)
