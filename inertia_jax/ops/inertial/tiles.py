"""Tiles of outputs: their geometry, and two ways to fill them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from inertia_jax.ops.conv.conv import Padding, Pads, conv2d, explicit_padding
from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.inertial.settings import Low
from inertia_jax.ops.inertial.views import square_offsets, sum_views, total
from inertia_jax.ops.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Geometry of tiles of outputs.

    Attributes:
        core_size: Side m of the core.
        tile_size: Side n of a tile.
        pads: Zeros around the image, with which every tile has its whole region.
        tiles: Number of tiles (vertical, horizontal).
        output_size: Size of the map, before zeros filled the last tiles.
        low: Value that fills a closed tile.
    """

    core_size: int
    tile_size: int
    pads: Pads
    tiles: tuple[int, int]
    output_size: tuple[int, int]
    low: Low


def make_tiling(
    image_size: tuple[int, int],
    *,
    core_size: int,
    region_size: int,
    padding: Padding,
    low: Low,
) -> Tiling:
    """Cuts the map of an m x m convolution into tiles.

    Raises:
        ValueError: The padded image is smaller than the core.
    """
    m, n = core_size, region_size - core_size + 1
    pads = explicit_padding(image_size, (m, m), (1, 1), padding, (1, 1))
    output_size, tiles, filled = [], [], []
    for side, (before, after) in zip(image_size, pads, strict=True):
        outputs = side + before + after - m + 1
        if outputs < 1:
            raise ValueError(
                f"`core` (side {m}) must be at most the padded image's sides; the "
                f"image is {image_size}, the padding {pads}."
            )
        count = -(-outputs // n)
        output_size.append(outputs)
        tiles.append(count)
        filled.append((before, after + count * n - outputs))
    return Tiling(
        core_size=m,
        tile_size=n,
        pads=(filled[0], filled[1]),
        tiles=(tiles[0], tiles[1]),
        output_size=(output_size[0], output_size[1]),
        low=low,
    )


def spread(
    tiles: Float[Array, "n rows columns c"], tile_size: int
) -> Float[Array, "n h w c"]:
    """Returns the map in which each tile's value stands at all its positions."""
    window, step = (1, tile_size, tile_size, 1), tile_size - 1

    def repeat(tiles: Array) -> Array:
        n, rows, columns, c = tiles.shape
        shape = (n, rows, tile_size, columns, tile_size, c)
        wide = jnp.broadcast_to(tiles[:, :, None, :, None], shape)
        return wide.reshape(n, rows * tile_size, columns * tile_size, c)

    def sum_dilated(tiles: Array) -> Array:
        # Zeros lie between the tiles, so that each window has one of them. XLA for TPU
        # fuses this with what reads it; a broadcast map of six axes it writes first.
        return lax.reduce_window(
            tiles,
            tiles.dtype.type(0),
            lax.add,
            window,
            window_strides=(1, 1, 1, 1),
            padding=((0, 0), (step, step), (step, step), (0, 0)),
            base_dilation=window,
        )

    return by_platform(tiles, tpu=sum_dilated, default=repeat)


def tile_means(
    high: Float[Array, "n h w c"], tiling: Tiling
) -> Float[Array, "n rows columns c"]:
    """Returns the values that fill closed tiles, from the outputs of all tiles."""
    n = tiling.tile_size
    if tiling.low == "sample":
        return high[:, (n - 1) // 2 :: n, (n - 1) // 2 :: n]

    def sum_slices(high: Array) -> Array:
        return total(high[:, i::n, j::n] for i, j in square_offsets(n))

    def sum_windows(high: Array) -> Array:
        window = (1, n, n, 1)
        zero = high.dtype.type(0)
        return lax.reduce_window(high, zero, lax.add, window, window, "VALID")

    wide = high.astype(at_least_float32(high.dtype))
    sums = by_platform(wide, tpu=sum_windows, default=sum_slices)
    return (sums / n**2).astype(high.dtype)


def fill_low(
    padded: Float[Array, "n hp wp c_in"],
    core: Float[Array, "m m c_in c_out"],
    tiling: Tiling,
) -> Float[Array, "n rows columns c_out"]:
    """Returns the values that fill closed tiles, from one core evaluation per tile.

    The result is in float32 at least.
    """
    m, n = tiling.core_size, tiling.tile_size
    spans = [(count - 1) * n + m for count in tiling.tiles]
    if tiling.low == "sample":
        start = (n - 1) // 2
        image = padded[:, start : start + spans[0], start : start + spans[1]]
    else:
        image = sum_views(padded, None, side=n) / n**2
    wide = at_least_float32(padded.dtype)
    return conv2d(image, core, strides=n, padding="VALID").astype(wide)


def spared_output(tiling: Tiling, dtype: Any, *, is_exact: bool = True) -> int | None:
    """Returns which output of an open tile, row by row, `low` gives, or None.

    `is_exact` says that products of float32 are rounded to float32, as on CPU; GPUs
    (TF32) and TPUs round them further by default.
    """
    if tiling.low == "sample":
        return (tiling.tile_size - 1) // 2 * (tiling.tile_size + 1)
    least = 4 if is_exact else 8
    return tiling.tile_size**2 - 1 if jnp.dtype(dtype).itemsize >= least else None


def fill_open(
    padded: Float[Array, "n hp wp c_in"],
    core: Float[Array, "m m c_in c_out"],
    low: Float[Array, "n rows columns c_out"],
    gate: Bool[Array, "n rows columns"],
    tiling: Tiling,
    *,
    capacity: int,
    is_exact: bool = True,
) -> Float[Array, "n h w c_out"]:
    """Returns the map: open tiles in detail, the others filled by `low`.

    Only n^2 - 1 of an open tile's n^2 outputs are computed. The last one is `low`
    itself, or follows from the others and `low`, their mean. (Where that mean is not
    finite, neither is the output that follows, and its rounding is relative to the
    tile's largest.) In bfloat16, and where products of float32 are narrower, the mean's
    rounding would show n^2 times: there all n^2 outputs are computed. `capacity` tiles
    are gathered and computed; no more of them may be open.
    """
    m, n = tiling.core_size, tiling.tile_size
    width, c_in = padded.shape[2:]
    found = find_open(gate, tiling, capacity=capacity)
    outputs = square_offsets(n)
    spared = spared_output(tiling, core.dtype, is_exact=is_exact)
    computed = [output for i, output in enumerate(outputs) if i != spared]
    taps = [(p + a) * width + q + b for p, q in computed for a, b in square_offsets(m)]
    patches = _take_pixels(padded, found, taps, tile_size=n)
    high = jnp.dot(
        patches.reshape(-1, m * m * c_in),
        core.reshape(m * m * c_in, -1),
        preferred_element_type=low.dtype,
    ).reshape(capacity, len(computed), -1)
    if spared is not None:
        flat = low.reshape(-1, low.shape[-1])
        known = jnp.take(flat, found.tile, axis=0, mode="clip")
        if tiling.low == "mean":
            known = n * n * known - high.sum(1)
        parts = [high[:, :spared], known[:, None], high[:, spared:]]
        high = jnp.concatenate(parts, axis=1)
    return put_open(low, high, found, tiling).astype(core.dtype)


class OpenTiles(NamedTuple):
    """Places of open tiles; surplus entries are out of range.

    Tiles are counted over all images, rows and columns within the tile's image.
    """

    tile: Int[Array, " capacity"]
    image: Int[Array, " capacity"]
    row: Int[Array, " capacity"]
    column: Int[Array, " capacity"]


def find_open(
    gate: Bool[Array, "n rows columns"], tiling: Tiling, *, capacity: int
) -> OpenTiles:
    """Returns where open tiles are; at most `capacity` of them."""
    rows, columns = tiling.tiles
    (tile,) = jnp.nonzero(gate.reshape(-1), size=capacity, fill_value=gate.size)
    image, place = tile // (rows * columns), tile % (rows * columns)
    return OpenTiles(tile, image, place // columns, place % columns)


def take_regions(
    padded: Float[Array, "n hp wp c"], found: OpenTiles, tiling: Tiling
) -> Float[Array, "capacity d d c"]:
    """Returns the region of each open tile, of side d = m + n - 1."""
    _, _, width, c = padded.shape
    d = tiling.core_size + tiling.tile_size - 1
    taps = [a * width + b for a, b in square_offsets(d)]
    pixels = _take_pixels(padded, found, taps, tile_size=tiling.tile_size)
    return pixels.reshape(-1, d, d, c)


def _take_pixels(
    padded: Array, found: OpenTiles, taps: Sequence[int], *, tile_size: int
) -> Array:
    """Takes pixels at distances `taps` from the first of each open tile's region."""
    _, height, width, c = padded.shape
    row = found.image * height + found.row * tile_size
    corner = row * width + found.column * tile_size
    index = corner[:, None] + jnp.asarray(taps)[None]
    return jnp.take(padded.reshape(-1, c), index.reshape(-1), axis=0, mode="clip")


def put_open(
    low: Float[Array, "n rows columns c"],
    high: Float[Array, "capacity outputs c"],
    found: OpenTiles,
    tiling: Tiling,
) -> Float[Array, "n h w c"]:
    """Returns the map of `low` with the outputs of open tiles, row by row, put in."""
    n, (rows, columns) = tiling.tile_size, tiling.tiles
    # Pixels are counted row by row; each is a copy of all channels.
    first = (found.image * rows * n + found.row * n) * columns * n + found.column * n
    steps = jnp.asarray([i * columns * n + j for i, j in square_offsets(n)])
    places = first[:, None] + steps[None]
    y = spread(low, n)
    pixels = y.reshape(-1, y.shape[-1])
    # Places beyond the last open tile lie in an image that does not exist.
    pixels = pixels.at[places.reshape(-1)].set(
        high.reshape(-1, y.shape[-1]), mode="drop"
    )
    return pixels.reshape(y.shape)
