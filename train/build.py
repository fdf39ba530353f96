"""What a configuration describes: its network, and how images become the input."""

import jax.numpy as jnp
from flax import linen as nn

from inertia_jax import Plan, create_model
from inertia_jax.metadata import Preprocessing
from train.config import Data, Model


def make_model(
    config: Model, *, num_classes: int, axis_name: str | None = None
) -> nn.Module:
    """Makes the configured network.

    Raises:
        ValueError: An unknown name, or an option outside its range.
    """
    return create_model(
        config.name,
        num_classes=num_classes,
        width=config.width,
        stem=config.stem,
        shortcut=config.shortcut,
        plan=Plan.from_json(config.plan),
        dtype=jnp.dtype(config.dtype),
        axis_name=axis_name,
    )


def make_preprocessing(data: Data, stored_shape: tuple[int, int, int]) -> Preprocessing:
    """Returns how the configured data become the network's input.

    Raises:
        ValueError: Mean or deviation do not fit the stored channels.
    """
    height, width, channels = stored_shape
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) != channels:
            raise ValueError(
                f"`data.{name}` (={values}) must have {channels} entries, one a "
                f"channel of these images."
            )
    size = data.image_size
    shape = (size, size, channels) if size else (height, width, channels)
    return Preprocessing(shape, data.mean, data.std, data.eval_resize)
