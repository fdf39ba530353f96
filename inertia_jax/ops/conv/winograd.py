"""3x3 convolutions of unit stride by Winograd's minimal filtering F(2x2, 3x3).

An image is cut into 4x4 tiles d that overlap by two pixels; each gives 2x2 outputs:

    Y = A^T [ (G g G^T) * (B^T d B) ] A            (Lavin & Gray, equation 8)

for a 3x3 filter g. Over all channels, the product * is sixteen matrix products, one for
each place (a, b) of the tile: per output tile and pair of channels, it takes 16
multiplications in place of 36. The transforms only hold 0, 1, -1 and 1/2, so that they
round as the direct sum does: at [64,16,16,128] with normal entries the largest error in
float32 was 2.6e-6 for both. (F(4x4, 3x3), with 36 multiplications for 16 outputs, had
5e-5, and is not here.) A pixel that is not finite makes its whole tile NaN.

References:
    Lavin & Gray, 2016, Fast Algorithms for Convolutional Neural Networks,
    https://arxiv.org/abs/1509.09308
"""

from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.conv.chunks import map_chunks, sum_chunks
from inertia_jax.ops.conv.conv import Pads, pad_image

# The rows of B^T, G and A^T are weights of pixels, taps and products.
_INPUT = (
    (1.0, 0.0, -1.0, 0.0),
    (0.0, 1.0, 1.0, 0.0),
    (0.0, -1.0, 1.0, 0.0),
    (0.0, 1.0, 0.0, -1.0),
)
_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
_TILE = 4
# Bytes of transformed tiles, and of products with them, that are worked on at a time.
# On two cores with 1 MiB of L2 each and 32 MiB of L3, [64,32,32,64] to 64 channels took
# 9.9 ms with 16 MiB, 10.7 with 32, and 16.2 with everything at once; [64,4,4,512] to
# 512, which fits into 16 MiB, took 8.0 ms, and 9.3 with 4 MiB.
_CHUNK_BYTES = 16 << 20

# One array for each place of the 4x4 tile: [n, tile rows, tile columns, c] of pixels,
# [c_in, c_out] of filters.
Planes = list[list[Array]]


def winograd_conv2d(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    padding: Pads,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves at stride 1, as `conv2d` does up to rounding.

    Filters have the type of the images, and padding leaves at least one output.
    """
    return convolve_transformed(x, transform_filters(kernel), padding=padding)


def transform_filters(kernel: Float[Array, "kh kw c_in c_out"]) -> Planes:
    """Returns G g G^T, a matrix [c_in, c_out] for each place of the tile.

    Raises:
        ValueError: The filters are not 3x3.
    """
    if kernel.shape[:2] != (3, 3):
        raise ValueError(f"`kernel` (shape {kernel.shape}) must be 3 x 3.")
    rows = [_combine(weights, kernel) for weights in _FILTER]
    return [[_combine(weights, row) for weights in _FILTER] for row in rows]


def winograd_input_gradient(
    cotangent: Float[Array, "n h_out w_out c_out"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    padding: Pads,
) -> Float[Array, "n h w c_in"]:
    """Returns the gradient of the images of `winograd_conv2d`.

    It is the convolution of the outputs' gradient with the filters turned by 180
    degrees, whose transform is that of the filters with places 0 and 3 exchanged.
    """
    (top, bottom), (left, right) = padding
    around = ((2 - top, 2 - bottom), (2 - left, 2 - right))
    # Without the barrier, XLA would keep the forward pass's transforms until here; they
    # are 16/9 of the kernel's size.
    filters = transform_filters(lax.optimization_barrier(kernel))
    turned = [[filters[a][b] for b in (3, 1, 2, 0)] for a in (3, 1, 2, 0)]
    return convolve_transformed(cotangent, turned, padding=around, contracted=1)


def convolve_transformed(
    x: Float[Array, "n h w c_in"],
    filters: Planes,
    *,
    padding: Pads,
    contracted: int = 0,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolves at stride 1 with filters that `transform_filters` returned.

    `contracted` is the axis of the filters that stands for the images' channels.
    """
    n, h, w, _ = x.shape
    (top, bottom), (left, right) = padding
    h_out, w_out = h + top + bottom - 2, w + left + right - 2

    def multiply(tile: Array, filter_: Array) -> Array:
        return lax.dot_general(tile, filter_, (((3,), (contracted,)), ((), ())))

    def convolve_chunk(x: Array) -> Array:
        products = [
            [multiply(tile, filter_) for tile, filter_ in zip(*rows, strict=True)]
            for rows in zip(_transform_input(x, padding), filters, strict=True)
        ]
        return transform_output(products)[:, :h_out, :w_out]

    c_out = filters[0][0].shape[1 - contracted]
    size = _images_a_chunk(x, (h_out, w_out), c_out)
    y = jax.ShapeDtypeStruct((n, h_out, w_out, c_out), x.dtype)
    return map_chunks(convolve_chunk, x, size=size, y=y)


def winograd_kernel_gradient(
    x: Float[Array, "n h w c_in"],
    cotangent: Float[Array, "n h_out w_out c_out"],
    *,
    padding: Pads,
) -> Float[Array, "3 3 c_in c_out"]:
    """Returns the gradient of the kernel of `winograd_conv2d`, its adjoint.

    dg = G^T [ sum over tiles of (B^T d B)^T (A dY A^T) ] G, where dY is the cotangent.
    """
    _, h_out, w_out, c_out = cotangent.shape
    c_in = x.shape[3]

    def products(x: Array, cotangent: Array) -> Planes:
        inputs = _transform_input(x, padding)
        outputs = _transform_cotangent(cotangent)
        return [
            [_sum_products(tile, out) for tile, out in zip(*rows, strict=True)]
            for rows in zip(inputs, outputs, strict=True)
        ]

    size = _images_a_chunk(x, (h_out, w_out), c_out)
    zero = [[jnp.zeros((c_in, c_out), x.dtype)] * _TILE for _ in range(_TILE)]
    sums = sum_chunks(products, x, cotangent, size=size, zero=zero)
    gathered = _on_both_sides(tuple(zip(*_FILTER, strict=True)), sums)
    return jnp.stack([jnp.stack(row) for row in gathered])


def _sum_products(a: Array, b: Array) -> Array:
    """Sums a^T b over images and tiles."""
    # With einsum over the four axes, XLA would transpose the first operand.
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _images_a_chunk(x: Array, output_size: tuple[int, int], c_out: int) -> int:
    tiles = -(-output_size[0] // 2) * -(-output_size[1] // 2)
    image_bytes = tiles * _TILE**2 * (x.shape[3] + c_out) * x.dtype.itemsize
    return max(1, min(x.shape[0], _CHUNK_BYTES // max(1, image_bytes)))


def _transform_input(x: Array, padding: Pads) -> Planes:
    """Returns B^T d B, [n, tile rows, tile columns, c_in] at each place of a tile."""
    (top, bottom), (left, right) = padding
    height = x.shape[1] + top + bottom - 2
    width = x.shape[2] + left + right - 2
    # If the number of outputs is odd, zeros fill the last tile.
    around = ((top, bottom + height % 2), (left, right + width % 2))
    return transform_tiles(pad_image(x, around))


def transform_tiles(padded: Float[Array, "n hp wp c"]) -> Planes:
    """Returns B^T d B of images that are padded already, to even sides."""
    return _separably(padded, _INPUT, overlap=2)


def _transform_cotangent(cotangent: Array) -> Planes:
    """Returns A dY A^T, [n, tile rows, tile columns, c_out] at each place of a tile."""
    _, height, width, _ = cotangent.shape
    padded = pad_image(cotangent, ((0, height % 2), (0, width % 2)))
    return _separably(padded, tuple(zip(*OUTPUT, strict=True)), overlap=0)


def _separably(x: Array, matrix: Sequence[Sequence[float]], *, overlap: int) -> Planes:
    """Applies a matrix to the rows and the columns of tiles two pixels apart."""
    side = 2 + overlap

    def views(x: Array, axis: int) -> list[Array]:
        count = (x.shape[axis] - overlap) // 2
        return [
            lax.slice_in_dim(x, i, i + 2 * count - 1, stride=2, axis=axis)
            for i in range(side)
        ]

    rows = [_combine(weights, views(x, 1)) for weights in matrix]
    return [[_combine(weights, views(row, 2)) for weights in matrix] for row in rows]


def transform_output(products: Planes) -> Float[Array, "n h w c_out"]:
    """Returns A^T M A, tiles side by side: [n, 2 tile rows, 2 tile columns, c_out]."""
    rows = [jnp.stack(row, axis=3) for row in _on_both_sides(OUTPUT, products)]
    n, h, w, _, c = rows[0].shape
    return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, c)


def _on_both_sides(
    matrix: Sequence[Sequence[float]], planes: Planes
) -> Iterator[list[Array]]:
    """Yields the rows of `matrix` M `matrix`^T."""
    columns = [
        [_combine(weights, column) for weights in matrix]
        for column in zip(*planes, strict=True)
    ]
    for row in zip(*columns, strict=True):
        yield [_combine(weights, row) for weights in matrix]


def _combine(weights: Sequence[float], arrays: Iterable[Array]) -> Array:
    """Returns the weighted sum, without products by 0, 1 and -1."""
    terms = [(w, array) for w, array in zip(weights, arrays, strict=True) if w]
    weight, total = terms[0]
    total = total if weight == 1 else weight * total
    for weight, array in terms[1:]:
        if weight == -1:
            total = total - array
        else:
            total = total + (array if weight == 1 else weight * array)
    return total
