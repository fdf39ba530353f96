"""A few images at a time: loops whose intermediate results stay in the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def map_chunks(
    function: Callable[[Array], Array],
    x: Array,
    *,
    size: int,
    y: jax.ShapeDtypeStruct,
) -> Array:
    """Applies a function that works image by image to `size` images at a time.

    Both `x` and the result are arrays [n, ...]; `y` holds the shape and type of the
    result for all images.
    """
    n = x.shape[0]
    if size >= n:
        return function(x)

    def put(start: Array | int, count: int, y: Array) -> Array:
        chunk = function(lax.dynamic_slice_in_dim(x, start, count))
        return lax.dynamic_update_slice_in_dim(y, chunk, start, axis=0)

    out = varying_as(jnp.zeros(y.shape, y.dtype), x)
    out = lax.fori_loop(0, n // size, lambda i, out: put(i * size, size, out), out)
    rest = n % size
    return put(n - rest, rest, out) if rest else out


def sum_chunks(
    function: Callable[..., Any], *arrays: Array, size: int, zero: Any
) -> Any:
    """Returns the sum of a function's results for `size` images at a time.

    `zero` is the sum over no images, in the types that the function returns.
    """
    n = arrays[0].shape[0]
    if size >= n:
        return function(*arrays)

    def add(start: Array | int, count: int, sums: Any) -> Any:
        chunks = [lax.dynamic_slice_in_dim(a, start, count) for a in arrays]
        return jax.tree.map(jnp.add, sums, function(*chunks))

    sums = jax.tree.map(lambda a: varying_as(a, *arrays), zero)
    sums = lax.fori_loop(0, n // size, lambda i, sums: add(i * size, size, sums), sums)
    rest = n % size
    return add(n - rest, rest, sums) if rest else sums


def varying_as(start: Array, *arrays: Array) -> Array:
    """Returns `start`, marked as varying over the devices that `arrays` vary over.

    `jax.shard_map` with `check_vma` wants a loop's carry to start with the type that it
    goes on with.
    """
    nothing = sum(jnp.sum(array[:0]).astype(start.dtype) for array in arrays)
    return start + nothing
