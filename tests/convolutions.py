"""XLA's convolution, and arguments and geometries for tests of convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GEOMETRIES = [  # image, c_in, c_out, kernel, strides, padding, dilation, groups
    (9, 4, 6, 3, 1, "SAME", 1, 1),
    (9, 4, 6, 3, 2, 1, 1, 1),
    (8, 4, 6, 3, 2, ((1, 2), (0, 1)), 2, 2),
    (8, 4, 6, 1, 1, 0, 1, 1),
    (9, 4, 6, 1, 2, "SAME", 1, 1),
    (2, 4, 6, 3, 1, 1, 1, 1),
    (2, 4, 6, 3, 2, "SAME", 1, 1),
    (4, 4, 6, 3, 1, ((2, 2), (2, 2)), 2, 1),
    (9, 4, 6, 3, 1, "VALID", 1, 1),
    (9, 4, 6, 3, 1, 0, 2, 2),
    (9, 4, 6, 3, 2, 0, 1, 1),
]


def normal(*shape, seed=0, dtype=np.float64):
    """Draws an array of normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def convolve(x, kernel, strides, padding, **options):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimensions, **options
    )


def drawn(seed, n, size, c_in, c_out, kernel_size, strides, padding, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, *size, c_in)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, c_in, c_out)), dtype)
    y = jax.eval_shape(lambda: convolve(x, kernel, strides, padding))
    return x, kernel, jnp.asarray(rng.normal(size=y.shape), dtype)
