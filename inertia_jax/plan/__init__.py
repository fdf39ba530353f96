"""The plan: which kind of convolution stands at every layer of a network."""

from typing import TYPE_CHECKING

from inertia_jax.lazy import importer

if TYPE_CHECKING:
    from inertia_jax.plan.plan import Plan
    from inertia_jax.plan.specs import (
        Conv,
        Fixed,
        Inertial,
        Learned,
        LowRank,
        Rate,
        Spec,
        Threshold,
        Tucker2,
    )


__all__ = [
    "Conv",
    "Fixed",
    "Inertial",
    "Learned",
    "LowRank",
    "Plan",
    "Rate",
    "Spec",
    "Threshold",
    "Tucker2",
]

__getattr__ = importer(
    __name__,
    {
        "plan": ("Plan",),
        "specs": (
            "Conv",
            "Fixed",
            "Inertial",
            "Learned",
            "LowRank",
            "Rate",
            "Spec",
            "Threshold",
            "Tucker2",
        ),
    },
)


def __dir__() -> list[str]:
    """Lists the public names: not the modules that they come from."""
    return __all__
