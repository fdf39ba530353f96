"""Gradients of convolutions in other forms than XLA's, for training on CPU.

XLA computes a kernel's gradient as a convolution whose filter is a whole image. Where
maps are large, that takes two to three times as long on CPU as the convolution itself.
Here it is matrix products over a few images at a time, whose views stay in the cache.

XLA computes the gradient of a strided convolution's images as a convolution of the
outputs with zeros between them, so that most products are by zero. Here there are no
zeros.
"""

import itertools

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.conv.chunks import sum_chunks
from inertia_jax.ops.conv.conv import Pads, conv2d, pad_image
from inertia_jax.ops.precision import at_least_float32

# Bytes of images and views that are worked on at a time, as many as caches hold. At
# [64,32,32,64] to 64 channels 4 MiB took 21 ms, 0.5 and 16 MiB 24 and 40, XLA 63.
_CHUNK_BYTES = 4 << 20
# Images are narrow if they have this many times fewer channels than the outputs.
_NARROW = 4


def kernel_gradient(
    x: Float[Array, "n h w c_in"],
    cotangent: Float[Array, "n h_out w_out c_out"],
    *,
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Pads,
) -> Float[Array, "kh kw c_in c_out"]:
    """Returns the gradient of a kernel as matrix products over a few images at a time.

    dK[i, j] = sum over images and positions (p, q) of x[p s + i, q s + j]^T g[p, q],
    the taps j side by side in one product; g is the cotangent and s the strides.
    """
    c_out = cotangent.shape[3]
    n, h, w, c_in = x.shape
    if x.size == 0 or cotangent.size == 0:
        return jnp.zeros((*kernel_size, c_in, c_out), x.dtype)
    # Views of narrow images are smaller than shifts of the outputs: views take 5.5 ms
    # and shifts 11 at [64,32,32,3] to 64, but 4.4 and 3.8 for 16 channels to 32.
    shifts = strides == (1, 1) and c_out < _NARROW * c_in
    views = kernel_size[1] * (c_out if shifts else c_in)
    chunk = max(1, _CHUNK_BYTES // (h * w * (c_in + views) * x.dtype.itemsize))
    if kernel_size == (1, 1):
        chunk = n  # One product is enough: there are no views to keep in the cache.

    def gradient(x: Array, cotangent: Array) -> Array:
        # Images are padded chunk by chunk: large new buffers cost more than products.
        padded = pad_image(x, padding)
        if shifts:
            return _part_by_shifts(padded, cotangent, kernel_size)
        return _part_by_views(padded, cotangent, kernel_size, strides)

    # Chunks summed in bfloat16 would lose the last images to rounding.
    zero = jnp.zeros((*kernel_size, c_in, c_out), at_least_float32(x.dtype))
    return sum_chunks(gradient, x, cotangent, size=chunk, zero=zero).astype(x.dtype)


def strided_input_gradient(
    cotangent: Float[Array, "n h_out w_out c_out"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    input_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Pads,
) -> Float[Array, "n h w c_in"]:
    """Returns the gradient of a strided convolution's images.

    Pixels p = s m + a of one phase a = 0..s-1 only meet every s-th tap, i = r + s t
    with r = (a + before) mod s:

        dx[s m + a] = sum over t of g[m + (a + before - r) / s - t] W[r + s t]^T,

    in both directions. This is one convolution of unit stride per phase. Here g is the
    cotangent, W the kernel, and `before` the padding above or on the left.
    """
    n, c_in = cotangent.shape[0], kernel.shape[2]
    counts = [-(-size // s) for size, s in zip(input_size, strides, strict=True)]
    phases = []
    for phase in itertools.product(*map(range, strides)):
        taps, around = [], []
        for axis, (a, s) in enumerate(zip(phase, strides, strict=True)):
            first = (a + padding[axis][0]) % s
            num_taps = len(range(first, kernel.shape[axis], s))
            taps.append(slice(first, None, s))
            before = num_taps - 1 - (a + padding[axis][0] - first) // s
            size = cotangent.shape[1 + axis]
            around.append((before, counts[axis] + num_taps - 1 - size - before))
        part = kernel[taps[0], taps[1]]
        if part.size == 0:  # Strides larger than the kernel skip pixels.
            phases.append(jnp.zeros((n, *counts, c_in), cotangent.dtype))
            continue
        turned = part[::-1, ::-1].swapaxes(2, 3)
        phases.append(conv2d(cotangent, turned, padding=tuple(around)))
    side_by_side = jnp.stack(phases, axis=3).reshape(n, *counts, *strides, c_in)
    height, width = (count * s for count, s in zip(counts, strides, strict=True))
    x = side_by_side.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, c_in)
    return x[:, : input_size[0], : input_size[1]]


def _part_by_shifts(x: Array, cotangent: Array, kernel_size: tuple[int, int]) -> Array:
    """Joins the taps of a row as shifts of the cotangent; x stays as it is."""
    kh, kw = kernel_size
    h_out, c_out = cotangent.shape[1], cotangent.shape[3]
    w, c_in = x.shape[2:]
    wide = pad_image(cotangent, ((0, 0), (kw - 1, kw - 1)))
    shifts = [wide[:, :, kw - 1 - j : kw - 1 - j + w] for j in range(kw)]
    shifted = jnp.concatenate(shifts, axis=-1)
    rows = [_product(x[:, i : i + h_out], shifted) for i in range(kh)]
    return jnp.stack(rows).reshape(kh, c_in, kw, c_out).swapaxes(1, 2)


def _part_by_views(
    x: Array, cotangent: Array, kernel_size: tuple[int, int], strides: tuple[int, int]
) -> Array:
    """Joins the taps of a row as views of x."""
    kh, kw = kernel_size
    n, h_out, w_out, c_out = cotangent.shape
    c_in = x.shape[-1]

    def view(i: int, j: int) -> Array:
        stop = (n, i + (h_out - 1) * strides[0] + 1, j + (w_out - 1) * strides[1] + 1)
        return lax.slice(x, (0, i, j, 0), (*stop, c_in), (1, *strides, 1))

    rows = []
    for i in range(kh):
        taps = jnp.concatenate([view(i, j) for j in range(kw)], axis=-1)
        rows.append(_product(taps, cotangent))
    return jnp.stack(rows).reshape(kh, kw, c_in, c_out)


def _product(a: Array, b: Array) -> Array:
    """Sums a^T b over images and positions."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return jnp.matmul(a.T, b, preferred_element_type=at_least_float32(a.dtype))
