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
    """

    step: Array
    params: Any
    collections: dict[str, Any]
    opt_state: optax.OptState
    totals: Totals

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, **self.collections}


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    key: Array,
    *,
    trained: frozenset[str] | None = None,
) -> TrainState:
    """Draws the first variables; all else starts at zero.

    Args:
        model: The network.
        tx: The optimiser.
        image_shape: [h, w, c] of the network's input.
        key: For the parameters.
        trained: Paths of the parameters that are trained; None: all.
    """
    variables = dict(init_variables(model, key, image_shape))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=variables,
        opt_state=jax.jit(tx.init)(split_params(params, trained)[0]),
        totals=Totals.zeros(),
    )


def training_to_dict(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint needs beside the variables, as nested dictionaries."""
    return {
        "step": state.step,
        "opt_state": serialization.to_state_dict(state.opt_state),
        "totals": serialization.to_state_dict(state.totals),
    }


def restore_state(template: TrainState, arrays: dict[str, Any]) -> TrainState:
    """Puts a checkpoint's arrays into a state of the same structure."""
    variables = dict(arrays["variables"])
    training = arrays["training"]
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
    )
