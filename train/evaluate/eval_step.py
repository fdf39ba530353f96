"""The evaluation step, written for one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jaxtyping import Int, UInt8

from inertia_jax.calls import same_keys
from inertia_jax.ops.precision import at_least_float32
from train.data.augment import Augmentation
from train.machine.parallel import AXIS
from train.step.objective import cross_entropy
from train.step.train_step import gate_rates


def make_eval_call(
    model: nn.Module, augmentation: Augmentation, *, flip_test: bool = False
) -> Callable[..., dict[str, Any]]:
    """Returns the function of one device that evaluates a batch.

    Its arguments are the variables, the images [m, h, w, c] and labels [m] on the
    device, and `indices` [n] into them. It returns arrays over all examples of all
    devices, in their order: `loss`; `prediction`; `rank`, the number of classes that
    score higher than the right one; and `gate_rates`, by path of the inertial layers.

    With `flip_test`, logits and gate rates are the means of those of the image and of
    its mirror image.
    """

    def answer(variables: dict[str, Any], batch: Array) -> tuple[Array, Any]:
        logits, sown = model.apply(
            variables,
            batch,
            train=False,
            mutable=["intermediates"],
            rngs=same_keys(jax.random.key(0)),
        )
        return logits, gate_rates(sown.get("intermediates", {}))

    def call(
        variables: dict[str, Any],
        images: UInt8[Array, "m h w c"],
        labels: Int[Array, "m"],
        indices: Int[Array, "n"],
    ) -> dict[str, Any]:
        batch = augmentation.for_evaluation(images[indices])
        targets = labels[indices]
        logits, rates = answer(variables, batch)
        if flip_test:
            logits = logits.astype(at_least_float32(logits.dtype))
            mirrored = answer(variables, batch[:, :, ::-1])
            logits, rates = jax.tree.map(
                lambda a, b: (a + b) / 2, (logits, rates), mirrored
            )
        score = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        # Ties go to the lower class, as in argmax. NaN counts as higher, so that it
        # does not pass for a right answer.
        classes = jnp.arange(logits.shape[-1])
        ahead = (logits == score) & (classes[None] < targets[:, None])
        higher = ~(logits <= score) | ahead
        results = {
            "loss": cross_entropy(logits, targets, label_smoothing=0.0),
            "prediction": jnp.argmax(logits, axis=-1),
            "rank": higher.sum(axis=-1),
            "gate_rates": rates,
        }
        return lax.all_gather(results, AXIS, tiled=True)

    return call
