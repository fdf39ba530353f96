"""Precision: the type that sums are taken in, and products in full."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# On GPU and TPU the default would round factors to TF32 or bfloat16.
precise_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns the type to sum in: float32 where `dtype` is narrower, else `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)
