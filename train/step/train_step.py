"""The training step, written for one device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Key, Shaped, UInt8

from inertia_jax.calls import same_keys
from inertia_jax.layers.inertial import FRICTION, GATE_RATE, mean_gate_rate
from inertia_jax.models.layers import POSITIONS
from train.data.augment import Augmentation, alternating_mirrors, example_keys
from train.keys import run_keys
from train.machine.parallel import AXIS
from train.own_network import OwnNetwork
from train.step.objective import Objective, cross_entropy, is_held
from train.step.state import Totals, TrainState, Update
from train.step.trainable import join_params, split_params


def gate_rates(intermediates: dict[str, Any]) -> dict[str, Float[Array, "n"]]:
    """Returns each inertial layer's share of open gates of each example, by path."""
    flat = traverse_util.flatten_dict(intermediates)
    return {
        "/".join(path): mean_gate_rate(rates, flat[*path, FRICTION])
        for (*path, name), rates in flat.items()
        if name == GATE_RATE and (*path, FRICTION) in flat
    }


def previous_examples(examples: Shaped[Array, "n *rest"]) -> Shaped[Array, "n *rest"]:
    """Returns the example before each in the global batch; before the first, the last.

    One example goes from each device to the next, so that pairs do not depend on how
    the batch is split over devices.
    """
    devices = lax.axis_size(AXIS)
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    first = lax.ppermute(examples[-1:], AXIS, ring)
    return jnp.concatenate([first, examples[:-1]])


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A step of one device, and a call of several.

    All randomness is a function of (seed, step, position): the step number holds the
    epoch, and positions are global, so the split over devices does not matter. With
    `alternating_flip`, `alternating_mirrors` says which images are mirrored.
    """

    model: nn.Module
    update: Update
    augmentation: Augmentation
    objective: Objective
    _: dataclasses.KW_ONLY
    alternating_flip: bool = False
    steps_per_epoch: int
    seed: int

    def call(
        self,
        state: TrainState,
        images: UInt8[Array, "m h w c"],
        labels: Int[Array, "m"],
        indices: Int[Array, "steps n"],
        positions: Int[Array, "n"],
        teacher: Any = None,
    ) -> tuple[TrainState, Totals]:
        """Takes several steps; returns the new state and its totals.

        Args:
            state: The state before.
            images: The images on the device.
            labels: The labels of these images.
            indices: The examples of each step, as places in `images`.
            positions: The examples' positions in the global batch.
            teacher: The teacher's variables; None without a teacher.
        """
        state = state.widened(self.model)
        if indices.shape[0] == 1:
            # A scan is avoided: XLA's gradients of convolutions on CPU are slow in it.
            state = self.step(state, images, labels, indices[0], positions, teacher)
        else:

            def body(state: TrainState, row: Array) -> tuple[TrainState, None]:
                return self.step(state, images, labels, row, positions, teacher), None

            state, _ = lax.scan(body, state, indices)
        return state, state.totals

    def step(
        self,
        state: TrainState,
        images: UInt8[Array, "m h w c"],
        labels: Int[Array, "m"],
        indices: Int[Array, "n"],
        positions: Int[Array, "n"],
        teacher: Any,
    ) -> TrainState:
        """Takes one step, with the arguments of `call`."""
        step_key = jax.random.fold_in(run_keys(self.seed).steps, state.step)
        augment_key, dropout_key = jax.random.split(step_key)
        pixels, keys = images[indices], example_keys(augment_key, positions)
        mirrored = self._mirrored(pixels, state.step)
        batch, weights = self._inputs(self.augmentation, pixels, keys, mirrored)
        targets = labels[indices]
        partners = targets if weights is None else previous_examples(targets)
        moving, fixed = split_params(state.params, self.update.trained)
        teacher_logits = self._teacher_logits(teacher, batch, pixels, keys, mirrored)

        def loss_fn(moving: Any) -> tuple[Array, Any]:
            params = join_params(moving, fixed)
            logits, collections, rates = self._forward(
                {"params": params, **state.collections}, batch, positions, dropout_key
            )
            smoothing = self.objective.label_smoothing
            losses = cross_entropy(logits, targets, label_smoothing=smoothing)
            if weights is not None:
                theirs = cross_entropy(logits, partners, label_smoothing=smoothing)
                losses = weights * losses + (1 - weights) * theirs
            loss, gate_rate = losses.mean(), jnp.zeros(())
            if rates:
                gate_rate = jnp.stack([rate.mean() for rate in rates.values()]).mean()
            held = []
            if self.objective.gate_budget is not None:
                gates = self.model.plan.gates
                held = [rate for path, rate in rates.items() if is_held(gates(path))]
            loss = self.objective.loss(loss, logits, teacher_logits, held)
            return loss, (collections, losses, logits, gate_rate)

        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(moving)
        collections, losses, logits, gate_rate = aux
        grads = lax.pmean(grads, AXIS)
        # With synchronised BatchNorm they are the same on every device already.
        collections = lax.pmean(collections, AXIS)
        updates, opt_state = self.update.tx.update(grads, state.opt_state, moving)
        if weights is not None:  # the label that weighs most counts as the right one
            targets = jnp.where(weights >= 0.5, targets, partners)
        totals = self._totals(state, losses, logits, targets, gate_rate, grads)
        state = state.replace(
            step=state.step + 1,
            params=join_params(optax.apply_updates(moving, updates), fixed),
            collections=collections,
            opt_state=opt_state,
            totals=totals,
        )
        return state.with_moved_averages(self.update.ema_decay)

    def _inputs(
        self,
        augmentation: Augmentation,
        pixels: UInt8[Array, "n h_stored w_stored c"],
        keys: Key[Array, "n"],
        mirrored: Bool[Array, "n"] | None,
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n"] | None]:
        """Returns the network's input, and the weight of each example's own label.

        The weights are None where no images are mixed; otherwise, the rest is that of
        the label of `previous_examples`.
        """
        batch = augmentation.for_training(pixels, keys, mirrored)
        if not augmentation.mixes:
            return batch, None
        return augmentation.mixed(batch, previous_examples(batch), keys)

    def _mirrored(
        self, pixels: UInt8[Array, "n h w c"], step: Int[Array, ""]
    ) -> Bool[Array, "n"] | None:
        """Returns which images are mirrored; None leaves it to their own keys."""
        if not self.alternating_flip:
            return None
        epoch, key = step // self.steps_per_epoch, run_keys(self.seed).mirrors
        return alternating_mirrors(pixels, epoch, key=key)

    def _teacher_logits(
        self,
        variables: Any,
        batch: Float[Array, "n h w c"],
        pixels: UInt8[Array, "n h_stored w_stored c"],
        keys: Key[Array, "n"],
        mirrored: Bool[Array, "n"] | None,
    ) -> Float[Array, "n k"] | None:
        """Returns the teacher's answers to the same crops, None without a teacher."""
        distillation = self.objective.distillation
        if distillation is None:
            return None
        dtype = jnp.dtype(distillation.model.dtype)
        if dtype != self.augmentation.dtype:
            # The teacher's images are normalised in the type of its computation.
            augmentation = dataclasses.replace(self.augmentation, dtype=dtype)
            batch, _ = self._inputs(augmentation, pixels, keys, mirrored)
        rngs = same_keys(jax.random.key(0))
        logits: Any = distillation.model.apply(variables, batch, train=False, rngs=rngs)
        logits = jnp.asarray(logits)
        if distillation.order is None:
            return logits
        return logits[:, np.array(distillation.order)]

    def _forward(
        self,
        variables: dict[str, Any],
        batch: Float[Array, "n h w c"],
        positions: Int[Array, "n"],
        dropout_key: Key[Array, ""],
    ) -> tuple[Array, dict[str, Any], dict[str, Array]]:
        """Returns logits, the collections after the step, and `gate_rates`."""
        moving = [name for name in variables if name != "params"]
        examples, position = POSITIONS
        logits, collections = self.model.apply(
            {**variables, examples: {position: positions}},
            batch,
            train=True,
            rngs=same_keys(self._own_key(dropout_key)),
            mutable=[*moving, "intermediates"],
        )
        collections = dict(collections)
        rates = gate_rates(collections.pop("intermediates", {}))
        return logits, collections, rates

    def _own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """Returns the key of this device's random layers.

        Our own `Dropout` draws by the examples' positions, from one key everywhere.
        """
        if not isinstance(self.model, OwnNetwork):
            return key
        return jax.random.fold_in(key, lax.axis_index(AXIS))

    def _totals(
        self,
        state: TrainState,
        losses: Float[Array, "n"],
        logits: Float[Array, "n k"],
        targets: Int[Array, "n"],
        gate_rate: Float[Array, ""],
        grads: Any,
    ) -> Totals:
        """Returns the state's totals with a step's examples added, of all devices."""
        totals, num_examples = state.totals, losses.shape[0]
        loss = lax.psum(losses.sum(dtype=jnp.float32), AXIS)
        correct = (jnp.argmax(logits, axis=-1) == targets).sum(dtype=jnp.int32)
        # An epoch's sums start anew with its first step.
        kept = (state.step % self.steps_per_epoch != 0).astype(jnp.int32)
        # A bad gradient would spoil parameters that a checkpoint then keeps.
        is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        is_bad = ~is_finite & (totals.bad_step < 0)
        return totals.replace(
            loss=totals.loss * kept + loss,
            correct=totals.correct * kept + lax.psum(correct, AXIS),
            count=totals.count * kept + lax.psum(jnp.int32(num_examples), AXIS),
            gate_rate=totals.gate_rate * kept
            + lax.psum(gate_rate.astype(jnp.float32) * num_examples, AXIS),
            bad_step=jnp.where(is_bad, state.step, totals.bad_step),
        )
