"""Pure functions on arrays; nothing here knows of Flax."""

from inertia_jax.ops.conv import conv2d
from inertia_jax.ops.pool import max_pool2d

__all__ = ["conv2d", "max_pool2d"]
