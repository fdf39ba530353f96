"""A few images at a time: loops whose intermediate results stay in the cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def map_chunks(
    function: Callable[[Array], Array], x: Array, *, size: int, y: jax.ShapeDtypeStruct
) -> Array:
    """Applies a function of images to `size` of them at a time.

    Args:
        function: Of [size, ...], or of fewer, image by image.
        x: [n, ...], the images.
        size: Images of a chunk, >= 1.
        y: What it gives for all of them, [n, ...].
    """
    n = x.shape[0]
    if size >= n:
        return function(x)

    def put(start: Array | int, count: int, y: Array) -> Array:
        images = lax.dynamic_slice_in_dim(x, start, count)
        return lax.dynamic_update_slice_in_dim(y, function(images), start, axis=0)

    out = _varying_as(jnp.zeros(y.shape, y.dtype), x)
    out = lax.fori_loop(0, n // size, lambda i, out: put(i * size, size, out), out)
    rest = n % size
    return put(n - rest, rest, out) if rest else out


def sum_chunks(
    function: Callable[..., Any], *arrays: Array, size: int, zero: Any
) -> Any:
    """Sums what a function gives for `size` images at a time.

    Args:
        function: Of arrays [size, ...], or of fewer images.
        arrays: [n, ...] each.
        size: Images of a chunk, >= 1.
        zero: The sum over no images, in the types that the function gives.
    """
    n = arrays[0].shape[0]
    if size >= n:
        return function(*arrays)

    def add(start: Array | int, count: int, sums: Any) -> Any:
        take = functools.partial(
            lax.dynamic_slice_in_dim, start_index=start, slice_size=count
        )
        return jax.tree.map(jnp.add, sums, function(*map(take, arrays)))

    sums = jax.tree.map(lambda of: _varying_as(of, *arrays), zero)
    sums = lax.fori_loop(0, n // size, lambda i, sums: add(i * size, size, sums), sums)
    rest = n % size
    return add(n - rest, rest, sums) if rest else sums


def _varying_as(start: Array, *arrays: Array) -> Array:
    """Returns `start` as different on each device as `arrays`, for `jax.shard_map`.

    With `check_vma` it wants a loop to begin with the type that it goes on with.
    """
    nothing = sum(jnp.sum(array[:0]).astype(start.dtype) for array in arrays)
    return start + nothing
