"""Views of an image at shifted places, and their sums."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from inertia_jax.ops.conv.conv import Padding, Pads, explicit_padding, pad_image
from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.precision import at_least_float32


def square_offsets(side: int) -> list[tuple[int, int]]:
    """Returns the (row, column) of each pixel of a square, row by row."""
    return [(i, j) for i in range(side) for j in range(side)]


def total(terms: Iterable[Array]) -> Array:
    """Returns the sum of at least one array."""
    return functools.reduce(jnp.add, terms)


def region_grid(
    image_size: Sequence[int],
    region_size: int,
    strides: tuple[int, int],
    padding: Padding,
) -> tuple[Pads, tuple[int, int]]:
    """Returns `padding` as pairs, and the number of regions (vertical, horizontal).

    Raises:
        ValueError: The padded image is smaller than one region.
    """
    size = (region_size, region_size)
    pads = explicit_padding(image_size, size, strides, padding, (1, 1))
    counts = []
    for side, step, (before, after) in zip(image_size, strides, pads, strict=True):
        room = side + before + after - region_size
        if room < 0:
            raise ValueError(
                f"`region_size` (={region_size}) must be at most the padded image's "
                f"sides; the image is {tuple(image_size)}, the padding {pads}."
            )
        counts.append(room // step + 1)
    return pads, (counts[0], counts[1])


def shifted_views(
    x: Float[Array, "n hp wp c"],
    offsets: Sequence[tuple[int, int]],
    *,
    output_size: tuple[int, int],
    strides: tuple[int, int],
    channel_stride: int = 1,
) -> list[Float[Array, "n h_out w_out c_out"]]:
    """Returns, for each offset, the pixels that lie there in every region."""
    down, across = strides
    rows, columns = output_size

    def split(x: Array) -> list[Array]:
        # Rows and columns are split by the strides, which makes views plain slices.
        # With these, friction of 2x2 tiles takes half as long on CPU.
        n, height, width, c = x.shape
        x = pad_image(x, ((0, -height % down), (0, -width % across)))
        x = x.reshape(n, -(-height // down), down, -(-width // across), across, c)
        found = []
        for i, j in offsets:
            row, column = slice(i // down, i // down + rows), j // across
            view = x[:, row, i % down, column : column + columns, j % across]
            found.append(view[..., ::channel_stride])
        return found

    def step(x: Array) -> list[Array]:
        # XLA for TPU keeps the padding out of memory, which it does not where rows and
        # columns are split: for 2x2 tiles of [256,32,32,64] in bfloat16 it estimates
        # 0.20 million cycles on v5e, not 0.71.
        return [
            x[:, i : i + rows * down : down, j : j + columns * across : across][
                ..., ::channel_stride
            ]
            for i, j in offsets
        ]

    if strides == (1, 1):
        return split(x)
    return by_platform(x, tpu=step, default=split)


def sum_views(
    x: Float[Array, "n hp wp c"],
    weights: Float[Array, "side side #c"] | None,
    *,
    side: int,
) -> Float[Array, "n h w c"]:
    """Returns sum_delta weights[delta] x[p + delta], with delta in a square.

    The images are `side` - 1 larger than the result. The sum is taken in float32 at
    least, and rounded once to the type of `x`. None weighs every place by 1.
    """
    wide = at_least_float32(x.dtype)
    if weights is None:
        weights = jnp.ones((side, side, 1), wide)
    return _sum_views(side, x.astype(wide), weights.astype(wide)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_views(side: int, x: Array, weights: Array) -> Array:
    size = (x.shape[1] - side + 1, x.shape[2] - side + 1)
    offsets = square_offsets(side)
    views = shifted_views(x, offsets, output_size=size, strides=(1, 1))
    pairs = zip(views, offsets, strict=True)
    return total(view * weights[i, j].reshape(1, 1, 1, -1) for view, (i, j) in pairs)


@_sum_views.defjvp
def _sum_views_jvp(
    side: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, weights), (x_dot, weights_dot) = primals, tangents
    # This is the same sum, but of padded images, and then cut. Its transpose is one
    # padding and a sum of views; the transpose of a sum of views would be a sum of
    # paddings, for which XLA takes four times as long on CPU.
    k = side - 1
    shifted = total(
        pad_image(x_dot * weights[i, j].reshape(1, 1, 1, -1), ((k - i, i), (k - j, j)))
        for i, j in square_offsets(side)
    )
    by_x = shifted[:, k : x.shape[1], k : x.shape[2]]
    return _sum_views(side, x, weights), by_x + _sum_views(side, x, weights_dot)
