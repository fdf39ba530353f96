"""The training step and the evaluation step, written for one device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax
from jaxtyping import Float, Int, UInt8

from inertia_jax import Inertial, Rate
from train.augment import Augmentation, alternating_mirrors, example_keys
from train.average import moving_average
from train.distill import Distillation
from train.keys import run_keys
from train.parallel import AXIS
from train.state import TrainState
from train.trainable import join_params, split_params


def cross_entropy(
    logits: Float[Array, "n k"], labels: Int[Array, "n"], *, label_smoothing: float
) -> Float[Array, "n"]:
    """Returns each example's loss, in float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(one_hot, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def gate_rates(intermediates: dict[str, Any]) -> dict[str, Float[Array, "n"]]:
    """Returns each inertial layer's share of open gates of each example, by path."""
    flat = traverse_util.flatten_dict(intermediates)
    return {"/".join(p[:-1]): v[0] for p, v in flat.items() if p[-1] == "gate_rate"}


def is_held(spec: Inertial | None) -> bool:
    """Returns whether a gate budget moves a layer's gates: by straight-through."""
    if spec is None:
        return False
    return spec.gate_gradient == "ste" and not isinstance(spec.threshold, Rate)


def make_train_call(
    model: nn.Module,
    tx: optax.GradientTransformation,
    augmentation: Augmentation,
    *,
    label_smoothing: float,
    alternating_flip: bool = False,
    ema_decay: float = 0.0,
    gate_budget: float | None = None,
    gate_penalty: float = 1.0,
    trained: frozenset[str] | None = None,
    distillation: Distillation | None = None,
    steps_per_epoch: int,
    seed: int,
) -> Callable[..., tuple[TrainState, Any]]:
    """Returns the function of one device that takes several steps.

    Its arguments are the state, the images [m, h, w, c] and labels [m] that lie on the
    device, the examples' places in them `indices` [steps, n], and their positions in
    the global batch [n]; with `distillation`, the teacher's variables come last. It
    returns the new state and its totals.

    With `alternating_flip`, images that are mirrored are so by `alternating_mirrors`.
    The state's averages, if it has any, follow with `ema_decay`.

    With `gate_budget`, the loss that is followed has `gate_penalty * (mean gate rate -
    gate_budget)^2` added, the mean over the whole batch and the layers whose gates it
    can move (`is_held`); the loss that is reported has not.

    With `trained`, paths of parameters, the others stay as they are, and no gradient is
    taken for them; what is no parameter, such as BatchNorm statistics, moves anyway.

    With `distillation`, the loss that is followed is `(1 - weight) * cross-entropy +
    weight * distillation_loss`; the teacher, in evaluation mode, sees the same crops.

    All randomness is a function of (seed, step, position): the step number holds the
    epoch, and positions are global, so the split over devices does not matter.
    """

    for_teacher = None
    if distillation is not None:
        dtype = jnp.dtype(distillation.model.dtype)
        if dtype != augmentation.dtype:
            for_teacher = dataclasses.replace(augmentation, dtype=dtype)

    def step(
        state: TrainState,
        images: UInt8[Array, "m h w c"],
        labels: Int[Array, "m"],
        indices: Int[Array, "n"],
        positions: Int[Array, "n"],
        teacher: Any,
    ) -> TrainState:
        step_key = jax.random.fold_in(run_keys(seed).steps, state.step)
        augment_key, dropout_key = jax.random.split(step_key)
        pixels, keys = images[indices], example_keys(augment_key, positions)
        mirrored = None
        if alternating_flip:
            epoch, key = state.step // steps_per_epoch, run_keys(seed).mirrors
            mirrored = alternating_mirrors(pixels, epoch, key=key)
        batch = augmentation.for_training(pixels, keys, mirrored)
        targets = labels[indices]
        moving, fixed = split_params(state.params, trained)
        if distillation is not None:
            # The same crops, and normalised in the type that the teacher computes in.
            seen = batch
            if for_teacher is not None:
                seen = for_teacher.for_training(pixels, keys, mirrored)
            teacher_logits = distillation.logits(teacher, seen)

        def loss_fn(moving: Any) -> tuple[Array, Any]:
            logits, collections = model.apply(
                {
                    "params": join_params(moving, fixed),
                    **state.collections,
                    "examples": {"position": positions},
                },
                batch,
                train=True,
                rngs={"dropout": dropout_key},
                mutable=[*state.collections, "intermediates"],
            )
            collections = dict(collections)
            rates = gate_rates(collections.pop("intermediates", {}))
            losses = cross_entropy(logits, targets, label_smoothing=label_smoothing)
            loss, gate_rate = losses.mean(), jnp.zeros(())
            if distillation is not None:
                loss = distillation.loss(loss, logits, teacher_logits)
            if rates:
                gate_rate = jnp.stack([rate.mean() for rate in rates.values()]).mean()
            if gate_budget is not None:
                specs = {path: model.plan.gates(path) for path in rates}
                held = [r.mean() for path, r in rates.items() if is_held(specs[path])]
                excess = lax.pmean(jnp.stack(held).mean(), AXIS) - gate_budget
                loss = loss + (gate_penalty * excess**2).astype(loss.dtype)
            return loss, (collections, losses, logits, gate_rate)

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, aux), grads = gradient_fn(moving)
        collections, losses, logits, gate_rate = aux
        grads = lax.pmean(grads, AXIS)
        # The same on every device already where BatchNorm is synchronised.
        collections = lax.pmean(collections, AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, moving)

        loss = lax.psum(losses.sum(dtype=jnp.float32), AXIS)
        correct = (jnp.argmax(logits, axis=-1) == targets).sum(dtype=jnp.int32)
        # An epoch's sums start anew with its first step.
        kept = (state.step % steps_per_epoch != 0).astype(jnp.int32)
        totals = state.totals
        # The gradient too: it could spoil the parameters that a checkpoint then keeps.
        is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        is_bad = ~is_finite & (totals.bad_step < 0)
        totals = totals.replace(
            loss=totals.loss * kept + loss,
            correct=totals.correct * kept + lax.psum(correct, AXIS),
            count=totals.count * kept + lax.psum(jnp.int32(targets.shape[0]), AXIS),
            gate_rate=totals.gate_rate * kept
            + lax.psum(gate_rate.astype(jnp.float32) * targets.shape[0], AXIS),
            bad_step=jnp.where(is_bad, state.step, totals.bad_step),
        )
        state = state.replace(
            step=state.step + 1,
            params=join_params(optax.apply_updates(moving, updates), fixed),
            collections=collections,
            opt_state=opt_state,
            totals=totals,
        )
        if state.averages is None:
            return state
        averages = moving_average(
            state.averages, state.variables, decay=ema_decay, step=state.step - 1
        )
        return state.replace(averages=averages)

    def call(
        state: TrainState,
        images: UInt8[Array, "m h w c"],
        labels: Int[Array, "m"],
        indices: Int[Array, "steps n"],
        positions: Int[Array, "n"],
        teacher: Any = None,
    ) -> tuple[TrainState, Any]:
        if indices.shape[0] == 1:
            # Not a scan of one: XLA's CPU convolution gradients are slow inside one.
            state = step(state, images, labels, indices[0], positions, teacher)
        else:

            def body(state: TrainState, row: Array) -> tuple[TrainState, None]:
                return step(state, images, labels, row, positions, teacher), None

            state, _ = lax.scan(body, state, indices)
        return state, state.totals

    return call


def make_eval_call(
    model: nn.Module, augmentation: Augmentation, *, flip_test: bool = False
) -> Callable[..., dict[str, Any]]:
    """Returns the function of one device that evaluates a batch.

    Its arguments are the variables, the images [m, h, w, c] and labels [m] on the
    device, and `indices` [n] into them. It returns, of every example of all devices in
    their order: `loss`, `prediction`, `rank`, the number of classes that score higher
    than the right one, and `gate_rates`, by path of the inertial layers.

    With `flip_test`, logits and gate rates are the means of those of the image and of
    its mirror image.
    """

    def answer(variables: dict[str, Any], batch: Array) -> tuple[Array, Any]:
        logits, sown = model.apply(
            variables, batch, train=False, mutable=["intermediates"]
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
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            mirrored = answer(variables, batch[:, :, ::-1])
            logits, rates = jax.tree.map(
                lambda a, b: (a + b) / 2, (logits, rates), mirrored
            )
        score = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        # Ties go to the lower class, as in argmax. Written so that NaN counts as
        # higher: it must not pass for a right answer.
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
