"""Forms of each convolution on a grid of ranks, and the joint choice of all forms."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.ops.tucker.rank_selection import kept_energy
from inertia_jax.ops.tucker.tucker import tucker2
from inertia_jax.ops.tucker.unfold import (
    left_singular,
    max_ranks,
    split_groups,
    unfold_in,
)
from inertia_jax.plan.specs import Conv, LowRank, Tucker2

# The most steps into which a layer's channels are cut.
_RANK_STEPS = 64


class Forms(NamedTuple):
    """The forms that one convolution may take, and the cost and error of each."""

    specs: tuple[Conv | Factorised, ...]
    costs: np.ndarray
    errors: np.ndarray

    def take(self, indices: Iterable[int]) -> "Forms":
        """Returns some of the forms, in the order of `indices`."""
        kept = list(indices)
        specs = tuple(self.specs[i] for i in kept)
        return Forms(specs, self.costs[kept], self.errors[kept])

    def hull(self) -> "Forms":
        """Returns the forms on the lower hull of error over cost, by rising cost."""
        return self.take(lower_hull(self.costs, self.errors))


def lower_hull(
    costs: Float[np.ndarray, "k"], errors: Float[np.ndarray, "k"]
) -> list[int]:
    """Returns the indices of the points on the lower convex hull, by rising cost.

    These are the points that are best at some price per unit of cost, from the cheapest
    to the one of least error. Every step along them removes less error for its cost
    than the step before.
    """
    hull: list[int] = []
    for i in np.lexsort((errors, costs)):
        if hull and errors[i] >= errors[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            slope_ab = (errors[b] - errors[a]) * (costs[i] - costs[a])
            slope_ai = (errors[i] - errors[a]) * (costs[b] - costs[a])
            if slope_ab < slope_ai:
                break
            hull.pop()
        hull.append(int(i))
    return hull


def pooled(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns points (x, y) whose y rises, made of points in the order of x.

    Neighbours whose y falls or stays are replaced by their mean: pool adjacent
    violators, the least-squares fit of what only rises, at the centres of its steps.
    """
    blocks: list[tuple[int, float, float]] = []
    for x, y in points:
        n = 1
        while blocks and blocks[-1][2] >= y:
            m, a, b = blocks.pop()
            n, x, y = n + m, (n * x + m * a) / (n + m), (n * y + m * b) / (n + m)
        blocks.append((n, x, y))
    return [(x, y) for _, x, y in blocks]


def make_grid(site: Site, kernel: np.ndarray, *, round_to: int) -> Forms:
    """Returns the forms with ranks on a grid of at most 64 steps a side.

    Costs are MACs. Errors are the shares of the kernel's energy that are lost, in
    [0, 1].

    Args:
        site: The convolution.
        kernel: Its kernel, weighed by its inputs where those are known.
        round_to: The number that every rank but the largest is a multiple of.
    """
    *_, c_in, c_out = kernel.shape
    most_in, most_out = max_ranks(kernel.shape, groups=site.groups)
    if site.is_pointwise:
        ranks = _steps(min(most_in, most_out), round_to)
        energy = np.zeros(most_in)
        for part in split_groups(kernel, site.groups):
            spectrum = np.asarray(left_singular(unfold_in(part))[1])
            energy[: len(spectrum)] += spectrum.astype(np.float64) ** 2
        kept = np.cumsum(energy)
        kept = kept / kept[-1] if kept[-1] > 0 else np.ones_like(kept)
        specs: tuple[Factorised, ...] = tuple(LowRank(rank) for rank in ranks)
        errors = 1 - kept[np.asarray(ranks) - 1]
    else:
        full = tucker2(
            kernel, rank_in=c_in, rank_out=c_out // site.groups, groups=site.groups
        )
        # Groups share their ranks, so the energies of their cores are summed.
        cores = split_groups(np.asarray(full.core, np.float64), site.groups)
        kept = kept_energy(np.sqrt(np.sum(cores**2, axis=0)))
        steps = _steps(most_in, round_to), _steps(most_out, round_to)
        pairs = list(itertools.product(*steps))
        specs = tuple(Tucker2(*ranks, core=site.core) for ranks in pairs)
        errors = np.array([1 - kept[i - 1, o - 1] for i, o in pairs])
    return Forms(specs, np.array([site.macs(spec) for spec in specs], float), errors)


def _steps(most: int, round_to: int) -> list[int]:
    step = max(round_to, math.ceil(most / _RANK_STEPS / round_to) * round_to)
    first = [1] if round_to == 1 and step > 1 else []
    return sorted({*first, *range(step, most + 1, step), most})


def all_forms(
    site: Site,
    grid: Forms,
    *,
    cost_of: Callable[[Conv | Factorised], float],
    error_of: Callable[[np.ndarray], np.ndarray],
) -> Forms:
    """Returns a convolution's present form, of error 0, and all cheaper forms.

    Args:
        site: The convolution.
        grid: Its forms, with the shares of energy that they lose.
        cost_of: The function from a form to its cost, in the units of the budget.
        error_of: The function from lost shares of energy to the error to minimise.
    """
    specs = (site.spec, *grid.specs)
    costs = np.array([cost_of(spec) for spec in specs], float)
    forms = Forms(specs, costs, np.concatenate([[0.0], error_of(grid.errors)]))
    return forms.take([0, *np.flatnonzero(costs < costs[0]).tolist()])


def make_choices(forms: Forms) -> Forms:
    """Returns the present form and those worth their cost, by falling cost."""
    hull = lower_hull(forms.costs, forms.errors)[::-1]
    # The present form comes first even where a cheaper one has no error either.
    return forms.take(dict.fromkeys([0, *hull]))


def allocate(
    choices: Mapping[str, Forms], *, fixed: float, budget: float
) -> dict[str, Conv | Factorised]:
    """Returns the forms of least summed error within a budget that can be met.

    Errors of different layers are assumed to add up. On convex hulls the optimum is
    found by steps to cheaper forms, in the order of error added for cost saved, until
    the budget is met.

    Args:
        choices: The result of `make_choices` for each convolution.
        fixed: The cost of everything else.
        budget: The cost allowed for everything.

    Raises:
        ValueError: A budget that no forms can meet.
    """
    steps = []
    for path, (specs, costs, errors) in choices.items():
        for i in range(1, len(specs)):
            saved = costs[i - 1] - costs[i]
            steps.append(((errors[i] - errors[i - 1]) / saved, path, i, saved))
    total = fixed + sum(forms.costs[0] for forms in choices.values())
    at = dict.fromkeys(choices, 0)
    for _, path, i, saved in sorted(steps):
        if total <= budget:
            break
        at[path] = i
        total -= saved
    if total > budget * (1 + 1e-12):
        raise ValueError(f"`budget` (={budget}) must be at least {total}.")
    # The last step may have saved more than needed, so steps that fit are undone.
    for _, path, i, saved in sorted(steps, reverse=True):
        if at[path] == i and total + saved <= budget:
            at[path], total = i - 1, total + saved
    return {path: forms.specs[at[path]] for path, forms in choices.items()}


def spend_rest(
    specs: Mapping[str, Conv | Factorised], forms: Mapping[str, Forms], rest: float
) -> dict[str, Conv | Factorised]:
    """Returns better forms, on the hull or off it, for what is left of a budget.

    In each round the best affordable form of every layer is found, and the layer that
    gains most takes its form. The rounds end when no layer gains.

    Args:
        specs: The forms chosen so far.
        forms: All forms of each convolution.
        rest: The part of the budget that is not spent.
    """
    at = {path: forms[path].specs.index(spec) for path, spec in specs.items()}
    # A sum that is rounded may lie below 0; the forms chosen so far are affordable.
    rest = max(rest, 0.0)
    while True:
        gains = []
        for path, (_, costs, errors) in forms.items():
            here = at[path]
            best = int(np.argmin(np.where(costs - costs[here] <= rest, errors, np.inf)))
            gains.append((errors[here] - errors[best], path, best))
        gain, path, best = max(gains)
        if not gain > 0:
            return {path: forms[path].specs[i] for path, i in at.items()}
        costs = forms[path].costs
        rest -= float(costs[best] - costs[at[path]])
        at[path] = best
