"""Max-pooling over windows that do not overlap."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float


def max_pool2d(
    x: Float[ArrayLike, "n h w c"], *, window: int
) -> Float[Array, "n h_out w_out c"]:
    """Returns the maximum of each `window` x `window` square.

    Rows and columns that fill no whole square are dropped, as PyTorch does. A reduction
    over split axes rather than `lax.reduce_window`, whose gradient (select-and-scatter)
    takes 15 times as long on CPU: 96 ms against 6.5 at [64,32,32,64]. Where several
    pixels are the maximum, they share its gradient.

    Args:
        x: Images.
        window: Side of a square and distance between them, in pixels.
    """
    x = jnp.asarray(x)
    n, h, w, c = x.shape
    rows, columns = h // window, w // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(n, rows, window, columns, window, c).max((2, 4))
