"""The networks of this library as NNX modules."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from inertia_jax.models import create


class Network(nnx.bridge.ToNNX):
    """A network of this library as an NNX module: Linen's, with its variables inside.

    It is called as `network(images)`, or with `train`; otherwise it is in the mode that
    `train()` and `eval()` set.

    Example:
        >>> from flax import nnx
        >>> network = ij.nnx.create_model("lenet", width=0.0625, rngs=nnx.Rngs(0))
        >>> network.eval()
        >>> network(images).shape
        (16, 10)
    """

    @property
    def use_running_average(self) -> bool:
        """Whether the network is in evaluation mode."""
        return bool(self.to_nnx__evaluates)

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        # Attributes without this prefix would be the network's variables.
        self.to_nnx__evaluates = value

    def __call__(self, *args: Any, train: bool | None = None, **kwargs: Any) -> Any:
        if train is None:
            train = not self.use_running_average
        mutable = ["batch_stats", "thresholds"] if train else False
        options = {"train": train, "mutable": mutable}
        return super().__call__(*args, **options | kwargs)


def create_model(name: str, *, rngs: nnx.Rngs, **options: Any) -> Network:
    """Makes a network as an NNX module, in training mode.

    Args:
        name: One of `MODEL_NAMES`.
        rngs: The streams that variables are drawn from, and dropout.
        **options: Those of `inertia_jax.create_model`.

    Raises:
        ValueError: What `inertia_jax.create_model` refuses.

    Example:
        >>> from flax import nnx
        >>> network = ij.nnx.create_model("lenet", width=0.0625, rngs=nnx.Rngs(0))
        >>> ij.count_cost(network, (28, 28, 1)).params
        4802
    """
    model = create.create_model(name, **options)
    network = Network(model, rngs=rngs)
    network.use_running_average = False
    shape = create.input_shape(model)
    return network.lazy_init(jnp.zeros((1, *shape)), train=False)
