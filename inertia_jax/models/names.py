"""The names of the networks."""

from inertia_jax.ops.inertial.settings import near_miss

MODEL_NAMES = (
    *("lenet", "resnet18", "resnet20", "resnet32", "resnet44", "resnet56"),
    *("simpledla", "vgg16"),
)


def check_model_name(argument: str, name: object) -> None:
    """Raises ValueError unless `name` is one of `MODEL_NAMES`."""
    if not isinstance(name, str) or name not in MODEL_NAMES:
        raise ValueError(
            f"`{argument}` (={name!r}) must be one of {', '.join(MODEL_NAMES)}."
            f"{near_miss(name, MODEL_NAMES)}"
        )
