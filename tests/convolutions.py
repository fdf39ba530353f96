"""XLA's convolution and random arguments, for tests of convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def normal(*shape, seed=0, dtype=np.float64):
    """Draws an array of normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def convolve(x, kernel, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimensions
    )


def drawn(seed, n, size, c_in, c_out, kernel_size, strides, padding, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, *size, c_in)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, c_in, c_out)), dtype)
    y = jax.eval_shape(lambda: convolve(x, kernel, strides, padding))
    return x, kernel, jnp.asarray(rng.normal(size=y.shape), dtype)
