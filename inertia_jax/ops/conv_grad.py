"""The gradient of a convolution's kernel as matrix products, for training on CPU.

XLA computes it as a convolution whose filter is a whole image, which on CPU takes two
to three times as long as the convolution where maps are large. Here it is matrix
products over a few images at a time, whose views stay in the cache.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.chunks import sum_chunks

# Bytes of images and views that are worked on at a time: what caches hold. At
# [64,32,32,64] to 64 channels 4 MiB took 21 ms, 0.5 and 16 MiB 24 and 40, XLA 63.
_CHUNK_BYTES = 4 << 20


def kernel_gradient(
    x: Float[Array, "n h w c_in"],
    cotangent: Float[Array, "n h_out w_out c_out"],
    *,
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "kh kw c_in c_out"]:
    """Returns the gradient of a kernel as matrix products over a few images at a time.

    dK[i, j] = sum over images and positions (p, q) of x[p s + i, q s + j]^T g[p, q],
    the taps j side by side in one product.

    Args:
        x: Images.
        cotangent: Gradient g of the outputs.
        kernel_size: Vertical and horizontal.
        strides: Likewise.
        padding: Zeros around the image.
    """
    n, _, _, c_out = cotangent.shape
    _, h, w, c_in = x.shape
    if n == 0:
        return jnp.zeros((*kernel_size, c_in, c_out), x.dtype)
    around = ((0, 0, 0), *((before, after, 0) for before, after in padding), (0, 0, 0))
    is_unit = strides == (1, 1)
    part = _unit_stride_part if is_unit else _strided_part
    views = kernel_size[1] * (c_out if is_unit else c_in)
    chunk = max(1, min(n, _CHUNK_BYTES // (h * w * (c_in + views) * x.dtype.itemsize)))

    def of_chunk(x: Array, cotangent: Array) -> Array:
        # Padded here, not all at once: large fresh buffers cost more than products.
        x = lax.pad(x, jnp.zeros((), x.dtype), around)
        return part(x, cotangent, kernel_size=kernel_size, strides=strides)

    # In bfloat16, sums of sums would not see the last images.
    zero = jnp.zeros((*kernel_size, c_in, c_out), _wide(x.dtype))
    return sum_chunks(of_chunk, x, cotangent, size=chunk, zero=zero).astype(x.dtype)


def _unit_stride_part(
    x: Array,
    cotangent: Array,
    *,
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
) -> Array:
    """The taps of a row side by side as shifts of the cotangent; x stays as it is."""
    kh, kw = kernel_size
    h_out, c_out = cotangent.shape[1], cotangent.shape[3]
    w, c_in = x.shape[2:]
    wide = jnp.pad(cotangent, ((0, 0), (0, 0), (kw - 1, kw - 1), (0, 0)))
    shifts = [wide[:, :, kw - 1 - j : kw - 1 - j + w] for j in range(kw)]
    shifted = jnp.concatenate(shifts, axis=-1)
    rows = [_product(x[:, i : i + h_out], shifted) for i in range(kh)]
    return jnp.stack(rows).reshape(kh, c_in, kw, c_out).swapaxes(1, 2)


def _strided_part(
    x: Array,
    cotangent: Array,
    *,
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
) -> Array:
    """The taps of a row side by side as views of x."""
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
    return jnp.matmul(a.T, b, preferred_element_type=_wide(a.dtype))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
