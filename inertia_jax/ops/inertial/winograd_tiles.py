"""Tiles of outputs of a 3x3 core, computed as Winograd does.

Nine of the sixteen products of a tile of 2x2 outputs (`ops.conv.winograd`) give its
mean, exactly: columns of A^T sum to 1, 2, 0 and -1, so that no product with the third
row or column of the tile counts. Every tile takes those nine; an open one takes the
other seven, too. Per pair of channels and tile, these are 9 + 7 rho multiplications at
gate rate rho; the dense convolution takes 16, and the direct sum 36. For larger tiles,
the regions of open ones are gathered, and convolved as small images.
"""

from jax import Array, lax
from jaxtyping import Bool, Float

from inertia_jax.ops.conv.winograd import (
    OUTPUT,
    Planes,
    convolve_transformed,
    transform_output,
    transform_tiles,
)
from inertia_jax.ops.inertial.tiles import Tiling, find_open, put_open, take_regions
from inertia_jax.ops.inertial.views import total

_MEAN = tuple(sum(column) / 2 for column in zip(*OUTPUT, strict=True))


def fits(tiling: Tiling) -> bool:
    """Whether tiles are of 2x2 outputs of a 3x3 core, closed ones filled by means."""
    return (tiling.core_size, tiling.tile_size, tiling.low) == (3, 2, "mean")


def fill_by_winograd(
    padded: Float[Array, "n hp wp c_in"],
    filters: Planes,
    gate: Bool[Array, "n rows columns"],
    tiling: Tiling,
    *,
    capacity: int,
) -> Float[Array, "n h w c_out"]:
    """Returns the map: open tiles in detail, the others filled by their mean.

    It is `fill_open` for a tiling that fits, with Winograd's filters for the core.
    """
    c_out = filters[0][0].shape[1]

    def multiply(pixels: Array, place: tuple[int, int]) -> Array:
        filter_ = filters[place[0]][place[1]]
        pixels = pixels.reshape(-1, pixels.shape[-1])
        return lax.dot_general(pixels, filter_, (((1,), (0,)), ((), ())))

    tiles = transform_tiles(padded)
    places = [(a, b) for a in range(4) for b in range(4)]
    shared = {
        (a, b): multiply(tiles[a][b], (a, b))
        for a, b in places
        if _MEAN[a] and _MEAN[b]
    }
    means = total(_MEAN[a] * _MEAN[b] * shared[a, b] for a, b in shared)
    found = find_open(gate, tiling, capacity=capacity)
    detail = transform_tiles(take_regions(padded, found, tiling))

    def product(a: int, b: int) -> Array:
        if (a, b) in shared:
            known = shared[a, b].at[found.tile].get(mode="clip")
        else:
            known = multiply(detail[a][b], (a, b))
        return known.reshape(capacity, 1, 1, c_out)

    high = transform_output([[product(a, b) for b in range(4)] for a in range(4)])
    low = means.reshape(*gate.shape, c_out)
    return put_open(low, high.reshape(capacity, 4, c_out), found, tiling)


def open_by_winograd(
    padded: Float[Array, "n hp wp c_in"],
    filters: Planes,
    low: Float[Array, "n rows columns c_out"],
    gate: Bool[Array, "n rows columns"],
    tiling: Tiling,
    *,
    capacity: int,
) -> Float[Array, "n h w c_out"]:
    """Returns the map: open tiles in detail, the others filled by `low`.

    It is `fill_open` for a 3x3 core, with Winograd's filters in its place. A region is
    36 pixels for a tile of 4x4 outputs, where direct sums gather 135.
    """
    found = find_open(gate, tiling, capacity=capacity)
    regions = take_regions(padded, found, tiling)
    high = convolve_transformed(regions, filters, padding=((0, 0), (0, 0)))
    high = high.reshape(capacity, tiling.tile_size**2, low.shape[-1])
    return put_open(low, high, found, tiling)
