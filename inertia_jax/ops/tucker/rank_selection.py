"""How many ranks a matrix or a kernel needs, and what each rank keeps."""

import math

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.tucker.unfold import left_singular, unfold_in, unfold_out

# tau = _TAU_SLOPE * sqrt(alpha): Nakajima et al., 2013, after their theorem 2.
_TAU_SLOPE = 2.5129
# Smallest noise level assumed, relative to the matrix: the rounding of some operations
# in float32. Without it, an exactly low-rank matrix would have no noise at all.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)


def energy_rank(singular_values: Float[ArrayLike, "k"], share: float) -> int:
    """Returns the least rank whose squared singular values sum to `share` of all.

    Args:
        singular_values: Singular values, the largest first.
        share: Share of the energy to keep, in (0, 1].

    Raises:
        ValueError: The share is outside its range.

    Example:
        >>> ij.ops.energy_rank(np.array([3.0, 2.0, 1.0]), 0.9)
        2
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` (={share}) must be in (0, 1].")
    energy = np.cumsum(np.asarray(singular_values, np.float64) ** 2)
    # Rounding must not ask for one more rank than a whole spectrum has.
    enough = energy >= share * energy[-1] * (1 - 1e-12)
    return int(np.argmax(enough)) + 1


def evbmf_rank(matrix: Float[ArrayLike, "m n"]) -> int:
    """Returns the rank that empirical variational Bayesian factorisation finds.

    The matrix is taken for a low-rank one plus Gaussian noise of unknown variance
    sigma^2. With the shorter side l, the longer m and alpha = l / m, components survive
    whose singular value exceeds sqrt(m sigma^2 (1 + tau) (1 + alpha / tau)), tau =
    2.5129 sqrt(alpha), and sigma^2 minimises the free energy, in one dimension.

    Args:
        matrix: A matrix of any shape.

    Returns:
        The rank, in [0, min(m, n)]; 0 where all of it looks like noise.

    Raises:
        ValueError: The matrix is not two-dimensional, or not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> signal = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 60))
        >>> ij.ops.evbmf_rank(signal + 0.1 * rng.normal(size=(40, 60)))
        3

    References:
        Nakajima et al., 2013, https://jmlr.org/papers/v14/nakajima13a.html, theorem 2
        and corollary 1
    """
    values = np.asarray(matrix, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"`matrix` (shape {values.shape}) must be [m, n], m and n >= 1."
        )
    if not np.isfinite(values).all():
        raise ValueError("`matrix` must be finite; some of it is not.")
    short, long = sorted(values.shape)
    tall = values if values.shape[0] == long else values.T
    # The Gram matrix in float64 is off by far less than the noise that decides.
    s = np.sqrt(np.maximum(np.linalg.eigvalsh(tall.T @ tall)[::-1], 0))
    if not s[0] > 0:
        return 0
    # The mean energy is scaled to 1, whatever the units of the matrix.
    s = s * math.sqrt(short * long / np.sum(s**2))
    s = np.maximum(s, _ROUNDING**2)  # This avoids log(0) and changes nothing else.
    alpha = short / long
    tau = _TAU_SLOPE * math.sqrt(alpha)
    x_least = (1 + tau) * (1 + alpha / tau)

    def free_energy(log_variance: float) -> float:
        # It is known up to constants; x are squared singular values in units of noise.
        x = s**2 / (long * math.exp(log_variance))
        kept = x[x > x_least]
        total = np.sum(x - np.log(x))
        shifted = kept - (1 + alpha)
        tau_x = (shifted + np.sqrt(shifted**2 - 4 * alpha)) / 2
        total += np.sum(np.log(tau_x + 1) - tau_x)
        return float(total + alpha * np.sum(np.log(tau_x / alpha + 1)))

    # The variance lies between that of the tail behind the most components that there
    # can be (rounding at least) and that of the whole matrix (1, as it is scaled).
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    tail = s[most:]
    least = max(tail[0] ** 2 / (long * x_least), np.mean(tail**2) / long, _ROUNDING**2)
    grid = np.linspace(math.log(least), 0.0, 200) if least < 1 else np.zeros(1)
    # The free energy has several minima: a grid finds the best one's valley.
    best = int(np.argmin([free_energy(point) for point in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    at = grid[best]
    if low < high:
        # Imported here: it takes a third of a second, and few programs need it.
        from scipy.optimize import minimize_scalar

        found = minimize_scalar(free_energy, bounds=(low, high), method="bounded")
        at = found.x if found.fun <= free_energy(at) else at
    threshold = math.sqrt(long * math.exp(at) * x_least)
    return int(np.sum(s > threshold))


def mode_spectra(
    kernel: Float[ArrayLike, "*sides c_in c_out"],
) -> tuple[Float[np.ndarray, "k_in"], Float[np.ndarray, "k_out"]]:
    """Returns the singular values of both channel unfoldings of a kernel."""
    kernel = np.asarray(kernel)
    _, s_in = left_singular(unfold_in(kernel))
    _, s_out = left_singular(unfold_out(kernel))
    return np.asarray(s_in), np.asarray(s_out)


def kept_energy(
    core: Float[ArrayLike, "*sides c_in c_out"],
) -> Float[np.ndarray, "c_in c_out"]:
    """Returns the share of a kernel's energy that each pair of ranks keeps.

    HOSVD keeps the leading block of the core of full rank, and its factors are
    orthonormal, so what `(rank_in, rank_out)` keeps is the energy of that block:
    exactly, not by the sum of the two tails that bounds it. The core is the one that
    `tucker2` returns at full rank; entry [i, j] is the share of ranks (i + 1, j + 1).
    """
    core = np.asarray(core, np.float64)
    energy = np.sum(core**2, axis=(*range(core.ndim - 2),))
    kept = energy.cumsum(0).cumsum(1)
    return kept / kept[-1, -1] if kept[-1, -1] > 0 else np.ones_like(kept)
