"""Max-pooling over windows that do not overlap."""

import functools

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float


def max_pool2d(
    x: Float[ArrayLike, "n h w c"], *, window: int
) -> Float[Array, "n h_out w_out c"]:
    """Returns the maximum of each `window` x `window` square.

    As in PyTorch, rows and columns that fill no whole square are dropped, and the first
    of equal pixels has the gradient; NaN is larger than any number.

    Args:
        x: Images.
        window: Side of a square and distance between squares, in pixels, >= 1.

    Raises:
        ValueError: `window` is less than 1 or larger than the images.

    Example:
        >>> ij.ops.max_pool2d(jnp.arange(16.0).reshape(1, 4, 4, 1), window=2)[
        ...     0, :, :, 0
        ... ]
        Array([[ 5.,  7.],
               [13., 15.]], dtype=float32)
    """
    x = jnp.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"`x` (shape {x.shape}) must be [n, h, w, c].")
    n, h, w, c = x.shape
    if not 1 <= window <= min(h, w):
        raise ValueError(f"`window` (={window}) must be in [1, {min(h, w)}].")
    rows, columns = h // window, w // window
    x = x[:, : rows * window, : columns * window]
    x = x.reshape(n, rows, window, columns, window, c)
    # The gradient of `lax.reduce_window` (select-and-scatter) takes ten times as long
    # on CPU. The gradient of `jnp.max` asks which pixels equal the maximum; where XLA
    # computes the pixels again for that, and rounds them otherwise (as it does with its
    # optimisations off), it may find none. So this chooses between pairs, row by row,
    # and takes the first of equal pixels in reading order.
    x = functools.reduce(_larger, [x[:, :, :, :, j] for j in range(window)])
    return functools.reduce(_larger, [x[:, :, i] for i in range(window)])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
