"""The networks, by name."""

from inertia_jax.models.create import (
    MODEL_NAMES,
    abstract_variables,
    create_model,
    image_shape_of,
    init_variables,
    input_shape,
    model_name,
)

__all__ = [
    "MODEL_NAMES",
    "abstract_variables",
    "create_model",
    "image_shape_of",
    "init_variables",
    "input_shape",
    "model_name",
]


def __dir__() -> list[str]:
    """Lists the public names: not the modules that they come from."""
    return __all__
