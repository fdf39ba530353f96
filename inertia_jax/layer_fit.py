"""The kernels of one layer, fitted by least squares to given outputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, cg

from inertia_jax.factorised import LowRankConv, Tucker2Conv
from inertia_jax.inertial_layer import InertialConv
from inertia_jax.specs import Inertial

# Layers whose parts are layers themselves.
OF_PARTS = (Tucker2Conv, LowRankConv)
# Less than this share of the dense outputs' square is rounding.
_NO_ERROR = 1e-9


def linear_parts(module: Any) -> tuple[str, ...]:
    """Returns the parts of a layer that its output is linear in; "" for itself."""
    if isinstance(module, Tucker2Conv):
        if not isinstance(module.core, Inertial):
            return ("u_in", "core", "u_out")
        # Friction is that of what u_in puts out.
        return ("u_out",) if module.core.combine == "max" else ("core", "u_out")
    if isinstance(module, LowRankConv):
        return ("left", "right")
    if isinstance(module, InertialConv):
        return () if module.combine == "max" else ("",)
    return ("",) if type(module) is nn.Conv else ()


class Seen(NamedTuple):
    """One call of a layer on one batch.

    Attributes:
        x: What the layer is called on, in the compressed network.
        y: What the dense layer puts out, in the dense network.
    """

    x: Array
    y: Array


class LayerFit:
    """A layer by itself, whose parts are fitted one at a time."""

    def __init__(self, module: Any, others: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the layer outside its network, to compute in float32 or wider.

        Args:
            module: As it stands in the network.
            others: Its variables that are no parameters, by collection.
        """
        wide = jnp.promote_types(module.dtype or module.param_dtype, jnp.float32)
        # Ladders are not for gradients.
        plain = {"capacities": None} if isinstance(module, InertialConv) else {}
        self._module = module.clone(parent=None, dtype=wide, **plain)
        self._others = {
            collection: traverse_util.unflatten_dict(dict(leaves), sep="/")
            for collection, leaves in others.items()
            if leaves
        }

    def _apply(
        self, fitted: Mapping[str, Any], leaves: Mapping[str, Any], x: Array
    ) -> Array:
        params = traverse_util.unflatten_dict({**leaves, **fitted}, sep="/")
        return jnp.asarray(self._module.apply({**self._others, "params": params}, x))

    def fit(
        self,
        leaves: dict[str, Any],
        part: str,
        seen: list[Seen],
        held_out: list[Seen],
        iterations: int,
    ) -> dict[str, Any]:
        """Returns the layer's parameters, one part of them fitted.

        Of the steps, those after the least error on what is held out are dropped.
        """
        names = [f"{part}/{name}".lstrip("/") for name in ("kernel", "bias")]
        wide = jnp.promote_types(seen[0].x.dtype, jnp.float32)
        start = {
            name: jnp.asarray(leaves[name], wide) for name in names if name in leaves
        }
        flat, unravel = ravel_pytree(start)
        # A bias that stays is no part of what is linear.
        unbiased = {
            name: jnp.zeros_like(leaf) if name.endswith("bias") else leaf
            for name, leaf in leaves.items()
        }

        @jax.jit
        def squared_error(vector: Array, x: Array, y: Array) -> Array:
            return jnp.square(y - self._apply(unravel(vector), leaves, x)).sum()

        @jax.jit
        def normal(vector: Array, x: Array) -> Array:
            """The normal equations' matrix, A^T A, times a vector."""
            out, transpose = jax.vjp(
                lambda v: self._apply(unravel(v), unbiased, x), vector
            )
            return transpose(out)[0]

        def matvec(vector: np.ndarray) -> np.ndarray:
            step = jnp.asarray(vector, flat.dtype)
            return np.sum([np.asarray(normal(step, x)) for x, _ in seen], axis=0)

        def error_held_out(step: np.ndarray) -> float:
            moved = flat + jnp.asarray(step, flat.dtype)
            errors = [squared_error(moved, *one) for one in held_out]
            return float(np.sum(jax.device_get(errors), dtype=np.float64))

        best = np.zeros(flat.size, flat.dtype)
        least = error_held_out(best)
        if least <= _NO_ERROR * float(sum(jnp.square(y).sum() for _, y in held_out)):
            return leaves

        def keep_if_better(step: np.ndarray) -> None:
            nonlocal best, least
            error = error_held_out(step)
            if error < least:
                best, least = step.copy(), error

        slope = jax.jit(jax.grad(squared_error))
        b = np.sum([np.asarray(slope(flat, *one)) for one in seen], axis=0) / -2
        operator = LinearOperator((flat.size,) * 2, matvec=matvec, dtype=flat.dtype)
        cg(operator, b, maxiter=iterations, rtol=1e-6, callback=keep_if_better)
        if not best.any():
            return leaves
        fitted = unravel(flat + jnp.asarray(best, flat.dtype))
        return leaves | {
            name: value.astype(jnp.asarray(leaves[name]).dtype)
            for name, value in fitted.items()
        }
