"""The state of training, which every step changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import linen as nn
from flax import serialization, struct
from jax import Array

from inertia_jax.ops.precision import at_least_float32
from train.step.trainable import split_params


class Totals(struct.PyTreeNode):
    """Sums over the training examples of an epoch so far.

    Attributes:
        loss: Sum of the loss.
        correct: Number of right answers, int32.
        count: Number of examples, int32.
        gate_rate: Sum of the examples' mean gate rates; 0 without inertial layers.
        bad_step: First step of the run whose loss or gradient was not finite, int32; -1
            for none.
    """

    # These are arrays on devices, NumPy's, or the shapes of either.
    loss: Any
    correct: Any
    count: Any
    gate_rate: Any
    bad_step: Any

    @classmethod
    def zeros(cls) -> "Totals":
        """Returns the totals before the first example."""
        zero, real = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(real, zero, zero, real, zero - 1)


@dataclasses.dataclass(frozen=True)
class Update:
    """How a step's gradient changes the state.

    Attributes:
        tx: The optimiser of the trained parameters.
        trained: Paths of the trained parameters; None means all. No gradient is taken
            for the others. BatchNorm statistics and the like always move.
        ema_decay: Highest decay of the averages, in [0, 1); 0: no averages are taken.
    """

    tx: optax.GradientTransformation
    _: dataclasses.KW_ONLY
    trained: frozenset[str] | None = None
    ema_decay: float = 0.0


class TrainState(struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
        step: Steps taken since the start of the run, int32.
        params: The parameters.
        collections: The model's other variables, e.g. `batch_stats`.
        opt_state: The optimiser's state for the trained parameters.
        totals: The sums over the epoch that `step` is in.
        averages: Averages of `variables` over the steps; None where none are taken.
    """

    step: Any
    params: Any
    collections: dict[str, Any]
    opt_state: optax.OptState
    totals: Totals
    averages: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables, as `model.apply` takes them."""
        return {"params": self.params, **self.collections}

    @property
    def result(self) -> dict[str, Any]:
        """The variables to evaluate and save: the averages, if there are any."""
        return self.variables if self.averages is None else self.averages

    def with_variables(self, variables: dict[str, Any]) -> "TrainState":
        """Returns the state with other variables, which averages then start from."""
        collections = dict(variables)
        params = collections.pop("params")
        # A copy: the step takes the memory of each for its results.
        averages = None if self.averages is None else jax.tree.map(jnp.copy, variables)
        return self.replace(params=params, collections=collections, averages=averages)

    def widened(self, model: nn.Module) -> "TrainState":
        """Returns the state in the types that training keeps it in.

        They are float32, or float64 where the network computes in it: narrower weights,
        such as imported ones, would not move by steps below their precision.
        """
        dtype = training_dtype(model)
        return self.replace(
            params=widened(self.params, dtype),
            collections=widened(self.collections, dtype),
            opt_state=widened(self.opt_state, dtype),
            averages=widened(self.averages, dtype),
        )

    def with_moved_averages(self, decay: float) -> "TrainState":
        """Returns the state after a step with its averages, if any, moved along."""
        if self.averages is None:
            return self
        averages = moving_average(
            self.averages, self.variables, decay=decay, step=self.step - 1
        )
        return self.replace(averages=averages)


def training_dtype(model: nn.Module) -> jnp.dtype:
    """Returns the type of what a network learns, whatever type it computes in."""
    return at_least_float32(getattr(model, "dtype", None) or jnp.float32)


def widened(tree: Any, dtype: jnp.dtype) -> Any:
    """Returns arrays whose real numbers are all of one type; integers stay."""

    def convert(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, tree)


def moving_average(averages: Any, variables: Any, *, decay: float, step: Array) -> Any:
    """Returns `d averages + (1 - d) variables` after a step.

    d = min(decay, (1 + step) / (10 + step)), with `step` steps before this one: the
    poor networks of the first steps are soon forgotten.
    """
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    moved = optax.incremental_update(variables, averages, rate)

    def choose(old: Any, new: Any, mean: Any) -> Array:
        # Rounding must not move what stays: frozen parameters, fixed thresholds.
        return jnp.where(new == old, old, mean.astype(old.dtype))

    return jax.tree.map(choose, averages, variables, moved)


def init_state(
    model: nn.Module,
    update: Update,
    variables: dict[str, Any],
) -> TrainState:
    """Returns the first state.

    Args:
        model: The network.
        update: How steps change the state.
        variables: Variables to start from.
    """
    variables = widened(variables, training_dtype(model))
    moving, _ = split_params(variables["params"], update.trained)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params={},
        collections={},
        opt_state=_first_opt_state(update.tx, moving),
        totals=Totals.zeros(),
        averages={} if update.ema_decay > 0 else None,
    )
    return state.with_variables(variables)


def _first_opt_state(tx: optax.GradientTransformation, params: Any) -> optax.OptState:
    """Returns what `tx.init(params)` does, without compiling anything for it.

    A program of zeros would be compiled for as long as a layer. All is zero in the
    first state of these optimisers but the constants that muon keeps in its state.
    """
    state = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(tx.init, params)
    )
    if not optax.tree.get_all_with_path(state, "ns_coeffs"):
        return state
    with jax.ensure_compile_time_eval():
        constants = np.asarray(optax.contrib.scale_by_muon().init({}).ns_coeffs)
    return optax.tree.set(state, ns_coeffs=constants)


def training_to_dict(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint holds besides `result`, as nested dictionaries."""
    return {
        "step": state.step,
        "opt_state": serialization.to_state_dict(state.opt_state),
        "totals": serialization.to_state_dict(state.totals),
        **({} if state.averages is None else {"variables": state.variables}),
    }


def restore_state(template: TrainState, arrays: dict[str, Any]) -> TrainState:
    """Puts a checkpoint's arrays into a state of the same structure."""
    training = arrays["training"]
    averages, variables = None, arrays["variables"]
    if template.averages is not None:
        averages, variables = variables, training["variables"]
    collections = dict(variables)
    # The totals of an older run may lack a sum, which then starts at zero.
    zeros = serialization.to_state_dict(Totals.zeros())
    totals = {**zeros, **training["totals"]}
    return TrainState(
        step=training["step"],
        params=collections.pop("params"),
        collections=collections,
        opt_state=serialization.from_state_dict(
            template.opt_state, training["opt_state"]
        ),
        totals=serialization.from_state_dict(template.totals, totals),
        averages=averages,
    )
