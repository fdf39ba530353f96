"""Pure functions on arrays; nothing here knows of Flax."""

from typing import TYPE_CHECKING

from inertia_jax.lazy import importer

if TYPE_CHECKING:
    from inertia_jax.ops.conv.conv import conv2d
    from inertia_jax.ops.inertial.friction import friction
    from inertia_jax.ops.inertial.gates import hard_gate, is_open, select
    from inertia_jax.ops.inertial.tiled import inertial_conv_tiled
    from inertia_jax.ops.inertial.window import InertialOutput, inertial_conv
    from inertia_jax.ops.pool import max_pool2d
    from inertia_jax.ops.tucker.factors import LowRankFactors, Tucker2Factors
    from inertia_jax.ops.tucker.low_rank import (
        low_rank,
        low_rank_conv,
        low_rank_to_kernel,
    )
    from inertia_jax.ops.tucker.rank_selection import energy_rank, evbmf_rank
    from inertia_jax.ops.tucker.tucker import tucker2, tucker2_conv, tucker2_to_kernel


__all__ = [
    "InertialOutput",
    "LowRankFactors",
    "Tucker2Factors",
    "conv2d",
    "energy_rank",
    "evbmf_rank",
    "friction",
    "hard_gate",
    "inertial_conv",
    "inertial_conv_tiled",
    "is_open",
    "low_rank",
    "low_rank_conv",
    "low_rank_to_kernel",
    "max_pool2d",
    "select",
    "tucker2",
    "tucker2_conv",
    "tucker2_to_kernel",
]

__getattr__ = importer(
    __name__,
    {
        "conv.conv": ("conv2d",),
        "inertial.friction": ("friction",),
        "inertial.gates": (
            "hard_gate",
            "is_open",
            "select",
        ),
        "inertial.tiled": ("inertial_conv_tiled",),
        "inertial.window": (
            "InertialOutput",
            "inertial_conv",
        ),
        "pool": ("max_pool2d",),
        "tucker.factors": (
            "LowRankFactors",
            "Tucker2Factors",
        ),
        "tucker.low_rank": (
            "low_rank",
            "low_rank_conv",
            "low_rank_to_kernel",
        ),
        "tucker.rank_selection": (
            "energy_rank",
            "evbmf_rank",
        ),
        "tucker.tucker": (
            "tucker2",
            "tucker2_conv",
            "tucker2_to_kernel",
        ),
    },
)


def __dir__() -> list[str]:
    """Lists the public names: not the modules that they come from."""
    return __all__
