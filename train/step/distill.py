"""Distillation: a network learns from a teacher's answers."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A teacher and its weight; its variables are arguments of the step.

    Attributes:
        model: The teacher's network, with the same number of classes.
        weight: The teacher's share of the loss, in (0, 1].
        temperature: Divisor of both networks' logits, > 0.
        order: The teacher's place of each class; None: the same.
    """

    model: nn.Module
    weight: float
    temperature: float
    order: tuple[int, ...] | None = None


def distillation_loss(
    logits: Float[Array, "n k"],
    teacher_logits: Float[Array, "n k"],
    *,
    temperature: float,
) -> Float[Array, "n"]:
    """Returns how far each example's answer is from the teacher's, in float32 at least.

    `T^2 KL(softmax(teacher_logits / T) || softmax(logits / T))`, in nats.

    Args:
        logits: The answers of the network that learns.
        teacher_logits: The teacher's answers.
        temperature: T; its square keeps the gradient's size where T is large.

    References:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531, section 2
    """
    dtype = jnp.result_type(logits, teacher_logits, jnp.float32)
    ours, theirs = (
        jax.nn.log_softmax(values.astype(dtype) / temperature)
        for values in (logits, teacher_logits)
    )
    divergence = optax.losses.kl_divergence_with_log_targets(ours, theirs)
    return temperature**2 * divergence
