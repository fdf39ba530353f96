"""The kernels of layers that became factors, beside those that they were made of."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from inertia_jax import CostTable
from inertia_jax.layers.kinds import KINDS
from inertia_jax.variables import subtree

# The names of the factors of each kind, in the order of computation.
_PARTS = {kind.name: kind.parts for kind in KINDS.values() if kind.parts}


@dataclasses.dataclass(frozen=True)
class FactorisedKernel:
    """A kernel that factors stand for.

    Attributes:
        path: The layer's path.
        shape: The kernel's shape [*sides, c_in / groups, c_out].
        ranks: (rank_in, rank_out) of Tucker-2, (rank,) of two factors.
        energy: The share of the kernel's squared norm that is left,
            1 - |K - K'|^2 / |K|^2.
    """

    path: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    energy: float


def compare_kernels(
    dense: Mapping[str, Any], small: Mapping[str, Any], cost: CostTable
) -> tuple[FactorisedKernel, ...]:
    """Compares the layers that became factors with the kernels before.

    Args:
        dense: The variables before.
        small: The variables after, before any training.
        cost: What the network costs, which names its layers and their ranks.

    Raises:
        ValueError: The network before has no such kernel.
    """
    kernels = []
    for row in cost.rows:
        if row.kind not in _PARTS or not row.ranks:
            continue
        before = subtree(dense["params"], row.path).get("kernel")
        parts = subtree(small["params"], row.path)
        after = product([parts[part]["kernel"] for part in _PARTS[row.kind]], row.ranks)
        if before is None or np.shape(before) != after.shape:
            there = "none" if before is None else f"one of shape {np.shape(before)}"
            raise ValueError(
                f"{row.path} must have a kernel of shape {after.shape}; it has {there}."
            )
        kernel = np.asarray(before, np.float64)
        total = np.sum(kernel**2)
        missed = np.sum((kernel - after) ** 2) / total if total else 0.0
        kernels.append(
            FactorisedKernel(row.path, kernel.shape, row.ranks, float(1 - missed))
        )
    return tuple(kernels)


def product(
    factors: Sequence[Any], ranks: Sequence[int]
) -> Float[np.ndarray, "*sides c_in c_out"]:
    """Returns the dense kernel of factors that stand after one another, in float64.

    K[..., i, g, o] = sum_rs U[i, g, r] C[..., r, g, s] V[s, g, o], where g counts the
    groups of channels. Two factors are those without the core C.

    Args:
        factors: The kernels, of which the first and the last have one tap.
        ranks: The ranks within a group.
    """
    kernels = [np.asarray(factor, np.float64) for factor in factors]
    first, last = (k.reshape(k.shape[-2:]) for k in (kernels[0], kernels[-1]))
    into = first.reshape(len(first), -1, ranks[0])
    groups = into.shape[1]
    out = last.reshape(len(last), groups, -1)
    if len(kernels) == 2:
        sides: tuple[int, ...] = kernels[0].shape[:-2]
        dense = np.einsum("igr,rgo->igo", into, out)
    else:
        *sides_, rank_in, _ = kernels[1].shape
        sides = tuple(sides_)
        core = kernels[1].reshape(*sides, rank_in, groups, -1)
        dense = np.einsum("igr,...rgs,sgo->...igo", into, core, out, optimize=True)
    return dense.reshape(*sides, len(first), -1)
