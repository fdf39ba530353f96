"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import serialization, struct
from jax import Array

from inertia_jax import init_variables
from train.trainable import split_params


class Totals(struct.PyTreeNode):
    """Sums over the training examples of an epoch so far.

    Attributes:
        loss: Sum of the loss.
        correct: Number of right answers, int32.
        count: Number of examples, int32.
        gate_rate: Sum of their mean rates of open gates; 0 without inertial layers.
        bad_step: First step of the run whose loss or gradient was not finite, int32; -1
            for none.
    """

    loss: Array
    correct: Array
    count: Array
    gate_rate: Array
    bad_step: Array

    @classmethod
    def zeros(cls) -> "Totals":
        """Returns the totals before the first example."""
        zero, real = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(real, zero, zero, real, zero - 1)


class TrainState(struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
        step: Steps taken since the start of the run, int32.
        params: The parameters.
        collections: The model's other variables, e.g. `batch_stats`.
        opt_state: The optimiser's, of the parameters that are trained.
        totals: Of the epoch that `step` is in.
        averages: Of `variables`, over the steps; None where none are taken.
    """

    step: Array
    params: Any
    collections: dict[str, Any]
    opt_state: optax.OptState
    totals: Totals
    averages: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, **self.collections}

    @property
    def result(self) -> dict[str, Any]:
        """What is evaluated and saved: the averages, if there are any."""
        return self.variables if self.averages is None else self.averages

    def with_variables(self, variables: dict[str, Any]) -> "TrainState":
        """Returns the state with other variables, which averages then start from."""
        collections = dict(variables)
        params = collections.pop("params")
        averages = self.averages
        if averages is not None:
            # A copy: the step takes the memory of each for its results.
            averages = jax.tree.map(jnp.copy, variables)
        return self.replace(params=params, collections=collections, averages=averages)


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    key: Array,
    *,
    trained: frozenset[str] | None = None,
    averaged: bool = False,
) -> TrainState:
    """Draws the first variables; all else starts at zero.

    Args:
        model: The network.
        tx: The optimiser.
        image_shape: [h, w, c] of the network's input.
        key: For the parameters.
        trained: Paths of the parameters that are trained; None: all.
        averaged: Whether averages are taken.
    """
    variables = init_variables(model, key, image_shape)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params={},
        collections={},
        opt_state=jax.jit(tx.init)(split_params(variables["params"], trained)[0]),
        totals=Totals.zeros(),
        averages={} if averaged else None,
    )
    return state.with_variables(variables)


def training_to_dict(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint needs beside `result`, as nested dictionaries."""
    return {
        "step": state.step,
        "opt_state": serialization.to_state_dict(state.opt_state),
        "totals": serialization.to_state_dict(state.totals),
        **({} if state.averages is None else {"variables": state.variables}),
    }


def restore_state(template: TrainState, arrays: dict[str, Any]) -> TrainState:
    """Puts a checkpoint's arrays into a state of the same structure."""
    training = arrays["training"]
    averages = None if template.averages is None else arrays["variables"]
    variables = dict((arrays if averages is None else training)["variables"])
    # Those of an older run may lack a sum, which then starts at zero.
    zeros = serialization.to_state_dict(Totals.zeros())
    totals = {**zeros, **training["totals"]}
    return TrainState(
        step=training["step"],
        params=variables.pop("params"),
        collections=variables,
        opt_state=serialization.from_state_dict(
            template.opt_state, training["opt_state"]
        ),
        totals=serialization.from_state_dict(template.totals, totals),
        averages=averages,
    )
