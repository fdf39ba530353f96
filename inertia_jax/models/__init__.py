"""The networks, by name."""

from typing import TYPE_CHECKING

from inertia_jax.lazy import importer

if TYPE_CHECKING:
    from inertia_jax.models.create import (
        abstract_variables,
        create_model,
        image_shape_of,
        init_variables,
        input_shape,
        model_name,
    )
    from inertia_jax.models.names import MODEL_NAMES


__all__ = [
    "MODEL_NAMES",
    "abstract_variables",
    "create_model",
    "image_shape_of",
    "init_variables",
    "input_shape",
    "model_name",
]

__getattr__ = importer(
    __name__,
    {
        "create": (
            "abstract_variables",
            "create_model",
            "image_shape_of",
            "init_variables",
            "input_shape",
            "model_name",
        ),
        "names": ("MODEL_NAMES",),
    },
)


def __dir__() -> list[str]:
    """Lists the public names: not the modules that they come from."""
    return __all__
