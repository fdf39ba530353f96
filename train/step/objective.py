"""The training loss: cross-entropy, a teacher's answers, a budget of gates."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float, Int

from inertia_jax import Inertial, Rate
from inertia_jax.ops.precision import at_least_float32
from train.machine.parallel import AXIS
from train.step.distill import Distillation, distillation_loss


def cross_entropy(
    logits: Float[Array, "n k"], labels: Int[Array, "n"], *, label_smoothing: float
) -> Float[Array, "n"]:
    """Returns each example's loss, in float32 at least."""
    logits = logits.astype(at_least_float32(logits.dtype))
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(one_hot, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def is_held(spec: Inertial | None) -> bool:
    """Returns whether a gate budget can move a layer's gates, by straight-through."""
    if spec is None:
        return False
    return spec.gate_gradient == "ste" and not isinstance(spec.threshold, Rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a step; the step reports the cross-entropy alone.

    `(1 - weight) * cross-entropy + weight * distillation_loss + gate_penalty * (mean
    gate rate - gate_budget)^2`

    Attributes:
        label_smoothing: Share of each target that all classes share, in [0, 1).
        gate_budget: Mean rate of open gates to hold; None adds no penalty.
        gate_penalty: Weight of the squared distance from the budget.
        distillation: The teacher, and the weight of its answers; None: no teacher.
    """

    label_smoothing: float = 0.0
    gate_budget: float | None = None
    gate_penalty: float = 1.0
    distillation: Distillation | None = None

    def loss(
        self,
        cross_entropy: Float[Array, ""],
        logits: Float[Array, "n k"],
        teacher_logits: Float[Array, "n k"] | None,
        held_rates: list[Float[Array, "n"]],
    ) -> Float[Array, ""]:
        """Returns the loss of a device's examples, given their mean cross-entropy.

        `held_rates` are the gate rates of the layers that the budget can move.
        """
        loss, teacher = cross_entropy, self.distillation
        if teacher is not None and teacher_logits is not None:
            temperature = teacher.temperature
            soft = distillation_loss(logits, teacher_logits, temperature=temperature)
            loss = (1 - teacher.weight) * loss + teacher.weight * soft.mean()
        if self.gate_budget is not None:
            rate = jnp.stack([rates.mean() for rates in held_rates]).mean()
            # The budget is for the whole batch and all layers together.
            excess = lax.pmean(rate, AXIS) - self.gate_budget
            loss = loss + (self.gate_penalty * excess**2).astype(loss.dtype)
        return loss
