"""Pure functions on arrays; nothing here knows of Flax."""

from inertia_jax.ops.conv import conv2d
from inertia_jax.ops.friction import friction
from inertia_jax.ops.gates import hard_gate, is_open, select
from inertia_jax.ops.inertial import InertialOutput, inertial_conv
from inertia_jax.ops.pool import max_pool2d
from inertia_jax.ops.tiled import inertial_conv_tiled

__all__ = [
    "InertialOutput",
    "conv2d",
    "friction",
    "hard_gate",
    "inertial_conv",
    "inertial_conv_tiled",
    "is_open",
    "max_pool2d",
    "select",
]
