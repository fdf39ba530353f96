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

    Rows and columns that fill no whole square are dropped, and of equal pixels the
    first has the gradient, as in PyTorch; NaN is larger than any number. A choice
    between pairs over split axes, not `lax.reduce_window`, whose gradient
    (select-and-scatter) takes ten times as long on CPU. Nor `jnp.max`, whose gradient
    asks which pixels equal the maximum: where XLA computes pixels once more for that,
    and rounds them otherwise (seen with its optimisations off), none may.

    Args:
        x: Images.
        window: Side of a square and distance between them, in pixels, >= 1.

    Raises:
        ValueError: `window` is less than 1 or larger than the images.
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
    # Row by row, so that of equal pixels the first in reading order is chosen.
    x = functools.reduce(_larger, [x[:, :, :, :, j] for j in range(window)])
    return functools.reduce(_larger, [x[:, :, i] for i in range(window)])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
