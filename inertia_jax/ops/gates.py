"""Gates: where friction exceeds its threshold, and the gradient through that choice."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

GateGradient = Literal["none", "ste"]


def is_open(
    friction: Float[ArrayLike, "*shape"], threshold: Float[ArrayLike, "*shape"]
) -> Bool[Array, "*shape"]:
    """Returns where friction is not at or below the threshold, so also where it is NaN.

    NaN opens: detail then reads the whole region, and the NaN shows in the output
    instead of being passed over.
    """
    return ~(jnp.asarray(friction) <= jnp.asarray(threshold))


def hard_gate(
    friction: Float[ArrayLike, "*shape"],
    threshold: Float[ArrayLike, "*shape"],
    *,
    slope: float,
) -> Float[Array, "*shape"]:
    """Returns 1 where the gate is open, else 0, with a straight-through gradient.

    Forward: `is_open`, exactly. Backward: that of
    `sigmoid(slope * (friction - threshold))`.

    Args:
        friction: Of each region.
        threshold: Broadcastable to it.
        slope: Steepness of the sigmoid, per unit of friction, > 0.

    References:
        Bengio et al., 2013, https://arxiv.org/abs/1308.3432
    """
    friction, threshold = jnp.asarray(friction), jnp.asarray(threshold)
    soft = jax.nn.sigmoid(slope * (friction - threshold))
    hard = is_open(friction, threshold).astype(soft.dtype)
    # Not `soft + stop_gradient(hard - soft)`: in bfloat16 that rounds, and the forward
    # is no longer 0 or 1.
    return lax.stop_gradient(hard) + (soft - lax.stop_gradient(soft))


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
        high: Detail.
        low: Inertia.
        friction: Of each position.
        threshold: One, or one a channel.
        gate_gradient: `none` or `ste`.
        slope: Steepness of the sigmoid, per unit of friction, > 0.
    """
    if gate_gradient == "none":
        return jnp.where(is_open(friction, threshold), high, low)
    return _ste_select(slope, high, low, friction, threshold)


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
    soft = jax.nn.sigmoid(slope * (friction - threshold))
    opening = slope * soft * (1 - soft) * (friction_dot - threshold_dot)
    moved = opening.astype(high.dtype) * (high - low)
    return jnp.where(gate, high, low), jnp.where(gate, high_dot, low_dot) + moved
