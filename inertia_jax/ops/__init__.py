"""Pure functions on arrays; nothing here knows of Flax."""

from inertia_jax.ops.conv import conv2d

__all__ = ["conv2d"]
