"""What convolutions may become on a grid of ranks, and the choice of all together."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from inertia_jax.ops.ranks import kept_energy, lower_hull, mode_spectra
from inertia_jax.ops.tucker import tucker2
from inertia_jax.ops.unfold import max_ranks, split_groups
from inertia_jax.sites import Factorised, Site
from inertia_jax.specs import Conv, LowRank, Tucker2

# Steps into which a layer's channels are cut.
_RANK_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Choices:
    """What one convolution may become: the lower hull of error over cost.

    The first is what it is, of error 0; the cost falls from each to the next.

    Attributes:
        specs: The forms.
        costs: Of each, in the units of the budget.
        errors: Of each.
    """

    specs: tuple[Conv | Factorised, ...]
    costs: tuple[float, ...]
    errors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class RankGrid:
    """The forms that ranks on a grid give a convolution.

    Attributes:
        specs: The forms.
        errors: Share of the kernel's energy that each loses, in [0, 1].
    """

    specs: tuple[Factorised, ...]
    errors: np.ndarray


def make_grid(site: Site, kernel: np.ndarray, *, round_to: int) -> RankGrid:
    """Returns all ranks on a grid of at most 64 steps a side, and what each loses.

    Args:
        site: The convolution.
        kernel: Its kernel, weighed by its inputs where they are known.
        round_to: Ranks are multiples of it, or the most there can be.
    """
    _, _, c_in, c_out = kernel.shape
    most_in, most_out = max_ranks(kernel.shape, groups=site.groups)
    if site.is_pointwise:
        ranks = _steps(min(most_in, most_out), round_to)
        energy = np.zeros(most_in)
        for part in split_groups(kernel, site.groups):
            spectrum = mode_spectra(part)[0]
            energy[: len(spectrum)] += spectrum.astype(np.float64) ** 2
        kept = np.cumsum(energy)
        kept = kept / kept[-1] if kept[-1] > 0 else np.ones_like(kept)
        factors = tuple(LowRank(rank) for rank in ranks)
        return RankGrid(factors, 1 - kept[np.asarray(ranks) - 1])
    full = tucker2(
        kernel, rank_in=c_in, rank_out=c_out // site.groups, groups=site.groups
    )
    # Each group's core has energy of its own; groups share their ranks.
    cores = np.asarray(split_groups(full.core, site.groups), np.float64)
    kept = kept_energy(np.sqrt(np.sum(cores**2, axis=0)))
    pairs = [
        (r_in, r_out)
        for r_in in _steps(most_in, round_to)
        for r_out in _steps(most_out, round_to)
    ]
    errors = np.array([1 - kept[i - 1, o - 1] for i, o in pairs])
    specs = tuple(Tucker2(i, o, core=site.core) for i, o in pairs)
    return RankGrid(specs, errors)


def _steps(most: int, round_to: int) -> list[int]:
    step = max(round_to, math.ceil(most / _RANK_STEPS / round_to) * round_to)
    first = [1] if round_to == 1 and step > 1 else []
    return sorted({*first, *range(step, most + 1, step), most})


Forms = tuple[tuple[Conv | Factorised, ...], np.ndarray, np.ndarray]


def all_forms(
    site: Site,
    grid: RankGrid,
    *,
    cost: Callable[[Conv | Factorised], float],
    error: Callable[[np.ndarray], np.ndarray],
) -> Forms:
    """Returns what a convolution is, and all cheaper forms, with costs and errors.

    Args:
        site: The convolution.
        grid: Its forms.
        cost: Of a form.
        error: Of lost shares of energy, what is to be made small.
    """
    specs: list[Conv | Factorised] = [site.spec, *grid.specs]
    costs = np.array([cost(spec) for spec in specs], float)
    errors = np.concatenate([[0.0], error(grid.errors)])
    kept = np.flatnonzero((costs < costs[0]) | (np.arange(len(specs)) == 0))
    return tuple(specs[i] for i in kept), costs[kept], errors[kept]


def make_choices(forms: Forms) -> Choices:
    """Returns the forms of a convolution that are worth their cost.

    Args:
        forms: As `all_forms` gives them.
    """
    specs, costs, errors = forms
    hull = lower_hull(costs, errors)
    if hull[-1] != 0:  # a form of no error at less cost replaces what stands there
        hull.append(0)
    hull = hull[::-1]
    return Choices(
        tuple(specs[i] for i in hull),
        tuple(float(costs[i]) for i in hull),
        tuple(float(errors[i]) for i in hull),
    )


def allocate(
    choices: Mapping[str, Choices], *, fixed: float, budget: float
) -> dict[str, Conv | Factorised]:
    """Returns the forms of least summed error within a budget that can be met.

    Errors are taken for additive. On hulls, the best is to take steps to cheaper forms
    in the order of error added for cost saved, until the budget is met.

    Args:
        choices: Of each convolution.
        fixed: Cost of all else.
        budget: Of everything.

    Raises:
        ValueError: A budget that no forms can meet.
    """
    steps = []
    for path, of in choices.items():
        for i in range(1, len(of.specs)):
            saved = of.costs[i - 1] - of.costs[i]
            steps.append(((of.errors[i] - of.errors[i - 1]) / saved, path, i, saved))
    total = fixed + sum(of.costs[0] for of in choices.values())
    at = dict.fromkeys(choices, 0)
    for _, path, i, saved in sorted(steps):
        if total <= budget:
            break
        at[path] = i
        total -= saved
    if total > budget * (1 + 1e-12):
        raise ValueError(f"`budget` (={budget}) must be at least {total}.")
    # The last step may have saved more than was asked for: give back what fits.
    for _, path, i, saved in sorted(steps, reverse=True):
        if at[path] == i and total + saved <= budget:
            at[path], total = i - 1, total + saved
    return {path: of.specs[at[path]] for path, of in choices.items()}


def spend_rest(
    specs: Mapping[str, Conv | Factorised],
    forms: Mapping[str, Forms],
    rest: float,
) -> dict[str, Conv | Factorised]:
    """Returns better forms for what a budget has left, also such off the hull.

    Again and again, of all layers, the one takes the best form it can afford that so
    gains most.

    Args:
        specs: The forms chosen so far.
        forms: All there are of each convolution, with their costs and errors.
        rest: What is left of the budget.
    """
    chosen = dict(specs)
    at = {path: forms[path][0].index(spec) for path, spec in specs.items()}
    while True:
        gains = []
        for path, (_, costs, errors) in forms.items():
            here = at[path]
            best = int(np.argmin(np.where(costs - costs[here] <= rest, errors, np.inf)))
            gains.append((errors[here] - errors[best], path, best))
        gain, path, best = max(gains)
        if not gain > 0:
            return chosen
        costs = forms[path][1]
        rest -= float(costs[best] - costs[at[path]])
        at[path], chosen[path] = best, forms[path][0][best]
