"""A few images at a time: loops whose intermediate results stay in the cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def map_chunks(function: Callable[[Any], Any], x: Any, *, size: int, y: Any) -> Any:
    """Applies a function that works image by image to `size` images at a time.

    Both `x` and the result are trees of arrays [n, ...]; `y` holds the shapes and types
    of the result for all images.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    if size >= n:
        return function(x)

    def put(start: Array | int, count: int, y: Any) -> Any:
        write = functools.partial(
            lax.dynamic_update_slice_in_dim, start_index=start, axis=0
        )
        return jax.tree.map(write, y, function(_take(x, start, count)))

    varying = jax.tree.leaves(x)
    out = jax.tree.map(lambda a: _varying_as(jnp.zeros(a.shape, a.dtype), *varying), y)
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
        return jax.tree.map(jnp.add, sums, function(*_take(arrays, start, count)))

    sums = jax.tree.map(lambda a: _varying_as(a, *arrays), zero)
    sums = lax.fori_loop(0, n // size, lambda i, sums: add(i * size, size, sums), sums)
    rest = n % size
    return add(n - rest, rest, sums) if rest else sums


def _take(arrays: Any, start: Array | int, count: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count), arrays)


def _varying_as(start: Array, *arrays: Array) -> Array:
    """Returns `start`, marked as varying over the devices that `arrays` vary over.

    `jax.shard_map` with `check_vma` wants a loop's carry to start with the type that it
    goes on with.
    """
    nothing = sum(jnp.sum(array[:0]).astype(start.dtype) for array in arrays)
    return start + nothing
