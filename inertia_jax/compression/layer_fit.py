"""Fits the kernels of one layer to given outputs by least squares."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.flatten_util import ravel_pytree

from inertia_jax.layers.inertial import InertialConv
from inertia_jax.ops.precision import at_least_float32

# Squared errors below this share of the dense outputs' squares are rounding in float32.
# In a narrower type the share is the square of the type's precision.
_NO_ERROR = 1e-9

Leaves = Mapping[str, Any]


class LayerIO(NamedTuple):
    """One call of a layer on one batch.

    Attributes:
        x: The layer's input in the compressed network.
        y: The dense layer's output in the dense network.
    """

    x: Array
    y: Array


def fit_part(
    module: Any,
    others: Mapping[str, Any],
    leaves: Leaves,
    part: str,
    calls: list[LayerIO],
    held_out: list[LayerIO],
    iterations: int,
) -> Leaves:
    """Returns a layer's parameters, one part of them fitted in float32 or wider.

    The result is that of the step with the least error on the held-out calls. It stays
    in float32 where the leaves are narrower, whose rounding may exceed the steps.

    Args:
        module: The layer as it stands in the network.
        others: Its variables other than parameters.
        leaves: Its parameters, those of its parts as `PART/kernel`.
        part: The name of the part, one of `kinds.linear_parts`.
        calls: The calls that the part is fitted to.
        held_out: The calls whose error chooses the step.
        iterations: The largest number of steps.
    """
    dtype, wide = jnp.dtype(module.dtype or module.param_dtype), calls[0].x.dtype
    changes: dict[str, Any] = {"parent": None, "name": None}
    changes["dtype"] = at_least_float32(dtype)
    if isinstance(module, InertialConv):
        changes["capacities"] = None  # ladders are not for gradients
    module = module.clone(**changes)
    names = [f"{part}/{name}".lstrip("/") for name in ("kernel", "bias")]
    start = {name: jnp.asarray(leaves[name], wide) for name in names if name in leaves}
    flat, unravel = ravel_pytree(start)
    rest = {name: leaf for name, leaf in leaves.items() if name not in start}
    # A bias that is not fitted is a constant, so the linear map leaves it out.
    unbiased = {
        name: jnp.zeros_like(leaf) if name.endswith("bias") else leaf
        for name, leaf in rest.items()
    }

    def total(trees: list[Any]) -> np.ndarray:
        return np.sum([np.asarray(ravel_pytree(t)[0]) for t in trees], axis=0)

    def matvec(vector: np.ndarray) -> np.ndarray:
        step = unravel(jnp.asarray(vector, flat.dtype))
        return total([_normal(module, others, unbiased, step, x) for x, _ in calls])

    def error_held_out(step: np.ndarray) -> float:
        moved = unravel(flat + jnp.asarray(step, flat.dtype))
        errors = [_squared_error(module, others, rest, moved, *io) for io in held_out]
        return float(np.sum(jax.device_get(errors), dtype=np.float64))

    best = np.zeros(flat.size, flat.dtype)
    least = error_held_out(best)
    squares = float(sum(jnp.square(y).sum() for _, y in held_out))
    if least <= max(_NO_ERROR, float(jnp.finfo(dtype).eps) ** 2) * squares:
        return leaves

    def keep_if_better(step: np.ndarray) -> None:
        nonlocal best, least
        found = error_held_out(step)
        if found < least:
            best, least = step.copy(), found

    b = total([_slope(module, others, rest, start, *io) for io in calls]) / -2
    # This import takes a quarter of a second, and few runs need it.
    from scipy.sparse.linalg import LinearOperator, cg

    operator = LinearOperator((flat.size,) * 2, matvec=matvec, dtype=flat.dtype)
    cg(operator, b, maxiter=iterations, rtol=1e-6, callback=keep_if_better)
    if not best.any():
        return leaves
    fitted = unravel(flat + jnp.asarray(best, flat.dtype))
    return dict(leaves) | {
        name: value.astype(at_least_float32(jnp.asarray(leaves[name]).dtype))
        for name, value in fitted.items()
    }


# The following functions are compiled once for all layers of one form.


def _apply(module: Any, others: Any, rest: Leaves, fitted: Leaves, x: Array) -> Array:
    params = traverse_util.unflatten_dict({**rest, **fitted}, sep="/")
    return jnp.asarray(module.apply({**others, "params": params}, x))


@functools.partial(jax.jit, static_argnums=0)
def _squared_error(
    module: Any, others: Any, rest: Leaves, fitted: Leaves, x: Array, y: Array
) -> Array:
    return jnp.square(y - _apply(module, others, rest, fitted, x)).sum()


_slope = jax.jit(jax.grad(_squared_error, argnums=3), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _normal(module: Any, others: Any, rest: Leaves, fitted: Leaves, x: Array) -> Leaves:
    """Returns the matrix of the normal equations, A^T A, times the parameters."""
    out, transpose = jax.vjp(lambda f: _apply(module, others, rest, f, x), fitted)
    (product,) = transpose(out)
    return dict(product)
