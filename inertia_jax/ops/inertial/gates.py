"""Gates: where friction exceeds its threshold, and the gradient through that choice."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from inertia_jax.ops.inertial.settings import (
    LEAST_CLOSING,
    OPEN,
    GateGradient,
    check_slope,
)


def is_open(
    friction: Float[ArrayLike, "..."], threshold: Float[ArrayLike, "..."]
) -> Bool[Array, "..."]:
    """Returns where friction is not at or below the threshold, so also where it is NaN.

    NaN opens the gate: detail reads the whole region, so that the NaN shows in the
    output instead of being passed over. A threshold that `is_closing` opens no gate.

    Example:
        >>> ij.ops.is_open(jnp.array([0.1, 0.2, jnp.nan]), 0.1).tolist()
        [False, True, True]
    """
    friction, threshold = jnp.asarray(friction), jnp.asarray(threshold)
    return ~((friction <= threshold) | is_closing(threshold))


def is_closing(threshold: Float[ArrayLike, "..."]) -> Bool[Array, "..."]:
    """Returns where a threshold closes every gate, whatever friction is, NaN included.

    `Fixed.CLOSED` is such a threshold.
    """
    return jnp.asarray(threshold) >= LEAST_CLOSING


def hard_gate(
    friction: Float[ArrayLike, "..."],
    threshold: Float[ArrayLike, "..."],
    *,
    slope: float,
) -> Float[Array, "..."]:
    """Returns 1 where the gate is open, else 0, with a straight-through gradient.

    The value is `is_open`, exactly; the tangents are those of
    `sigmoid(slope * (friction - threshold))`.

    Args:
        friction: Friction of each region.
        threshold: Threshold, broadcastable to the friction.
        slope: Steepness of the sigmoid, per unit of friction, > 0.

    Example:
        >>> ij.ops.hard_gate(jnp.array([0.1, 0.3]), 0.2, slope=10.0).tolist()
        [0.0, 1.0]
        >>> jax.grad(ij.ops.hard_gate)(0.2, 0.2, slope=10.0).item()
        2.5

    References:
        Bengio et al., 2013, https://arxiv.org/abs/1308.3432
    """
    check_slope(slope)
    return _hard_gate(slope, *_as_floats(friction, threshold))


def _as_floats(*values: ArrayLike) -> list[Array]:
    # Tangents of integers cannot be subtracted.
    arrays = [jnp.asarray(value) for value in values]
    return [
        a if jnp.issubdtype(a.dtype, jnp.floating) else a.astype(jnp.float32)
        for a in arrays
    ]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _hard_gate(slope: float, friction: Array, threshold: Array) -> Array:
    dtype = jnp.result_type(friction, threshold)
    return is_open(friction, threshold).astype(dtype)


@_hard_gate.defjvp
def _hard_gate_jvp(
    slope: float, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    opening = _opening(slope, primals, tangents)
    gate = _hard_gate(slope, *primals)
    return gate, opening.astype(gate.dtype)


def _opening(
    slope: float, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> Array:
    """Returns the tangent of `sigmoid(slope * (friction - threshold))`."""
    (friction, threshold), (friction_dot, threshold_dot) = primals, tangents
    soft = jax.nn.sigmoid(slope * (friction - threshold))
    return slope * soft * (1 - soft) * (friction_dot - threshold_dot)


def rate_threshold(
    friction: Float[Array, "..."], rate: float, *, axis_name: str | None = None
) -> Float[Array, ""]:
    """Returns the lowest threshold that at most a share of the friction exceeds.

    Bisection finds it to 2^-32 of the friction's range; sorting takes 25 times as long
    on CPU (25 ms, not 1, at [128,32,32]). It has no gradient. The share is in (0, 1],
    and 1 opens every gate. Friction is taken over the devices of a mesh axis together.
    """
    friction = lax.stop_gradient(friction)
    if rate == 1:
        return jnp.full((), OPEN, friction.dtype)

    def over_devices(value: Array, reduce: Any) -> Array:
        return value if axis_name is None else reduce(value, axis_name)

    low = over_devices(friction.min(), lax.pmin)
    high = over_devices(friction.max(), lax.pmax)
    size = jnp.asarray(friction.size, friction.dtype)
    most = rate * over_devices(size, lax.psum)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) / 2
        open_here = (friction > middle).sum(dtype=friction.dtype)
        too_many = over_devices(open_here, lax.psum) > most
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    # If fewer than the share exceed even the lowest friction, `below` is the result.
    below = low - (high - low) * 2**-20
    return lax.fori_loop(0, 32, halve, (below, high))[1]


def select(
    high: Float[Array, "n h w c"],
    low: Float[Array, "n h w c"],
    friction: Float[Array, "n h w 1"],
    threshold: Float[Array, "1 1 1 #c"],
    *,
    gate_gradient: GateGradient = "none",
    slope: float = 10.0,
) -> Float[Array, "n h w c"]:
    """Returns `high` where the gate is open and `low` elsewhere, by `jnp.where`.

    With `gate_gradient="ste"` the value is the same, and the tangent gains that of
    `sigmoid(slope * (friction - threshold)) * (high - low)` at fixed `high - low`, in
    forward and in reverse mode.

    Args:
        high: Values of detail.
        low: Values of inertia.
        friction: Friction of each position.
        threshold: One threshold, or one per channel.
        gate_gradient: `none` or `ste`.
        slope: Steepness of the sigmoid, per unit of friction, > 0.

    Example:
        >>> high, low = jnp.ones((1, 1, 2, 1)), jnp.zeros((1, 1, 2, 1))
        >>> friction = jnp.array([0.1, 0.3]).reshape(1, 1, 2, 1)
        >>> ij.ops.select(
        ...     high, low, friction, jnp.full((1, 1, 1, 1), 0.2)
        ... ).ravel().tolist()
        [0.0, 1.0]
    """
    if gate_gradient == "none":
        return jnp.where(is_open(friction, threshold), high, low)
    check_slope(slope)
    return _ste_select(slope, high, low, *_as_floats(friction, threshold))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ste_select(
    slope: float, high: Array, low: Array, friction: Array, threshold: Array
) -> Array:
    return jnp.where(is_open(friction, threshold), high, low)


@_ste_select.defjvp
def _ste_select_jvp(
    slope: float, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    high, low, friction, threshold = primals
    high_dot, low_dot, friction_dot, threshold_dot = tangents
    gate = is_open(friction, threshold)
    opening = _opening(slope, (friction, threshold), (friction_dot, threshold_dot))
    moved = opening.astype(high.dtype) * (high - low)
    return jnp.where(gate, high, low), jnp.where(gate, high_dot, low_dot) + moved
