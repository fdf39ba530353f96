"""Rules that choose the ranks of a network's convolutions."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping

import numpy as np

from inertia_jax.ops.ranks import (
    energy_rank,
    evbmf_rank,
    kept_energy,
    lower_hull,
    mode_spectra,
)
from inertia_jax.ops.tucker import (
    max_ranks,
    split_groups,
    tucker2,
    unfold_in,
    unfold_out,
)
from inertia_jax.plan import Conv, LowRank, Plan, Tucker2
from inertia_jax.sites import Factorised, Site

# Steps into which a layer's channels are cut where ranks are chosen for a budget.
_RANK_STEPS = 64


def _check_share(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(f"`{name}` (={value!r}) must be in (0, 1].")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ranks a share of the channels: `max(1, int(channels * ratio))`, everywhere.

    Attributes:
        ratio: In (0, 1]; also 1x1 convolutions become Tucker-2.
    """

    ratio: float

    def __post_init__(self) -> None:
        _check_share("ratio", self.ratio)


@dataclasses.dataclass(frozen=True)
class Energy:
    """The least ranks that keep a share of each unfolding's squared singular values.

    Attributes:
        share: In (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("share", self.share)


@dataclasses.dataclass(frozen=True)
class Evbmf:
    """The ranks that empirical variational Bayes finds in each unfolding, at least 1.

    References:
        Kim et al., 2016, https://arxiv.org/abs/1511.06530, section 3.2
    """


@dataclasses.dataclass(frozen=True)
class Budget:
    """All ranks together, for the least error at a share of the network's cost.

    Give one of the three.

    Attributes:
        macs: Share of the dense network's multiply-accumulates, in (0, 1].
        params: Share of its parameters.
        latency: Share of its time on this machine, layer by layer as measured.
        batch_size: Images a call where latency is measured.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        given = self._given
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` (={self.batch_size}) must be >= 1.")
        if len(given) != 1:
            raise ValueError(
                f"a Budget must have one of macs, params and latency; it has {given}."
            )
        _check_share(*next(iter(given.items())))

    @property
    def of(self) -> str:
        """`macs`, `params` or `latency`."""
        return next(iter(self._given))

    @property
    def share(self) -> float:
        """Share to keep."""
        return next(iter(self._given.values()))

    @property
    def _given(self) -> dict[str, float]:
        shares = {"macs": self.macs, "params": self.params, "latency": self.latency}
        return {name: share for name, share in shares.items() if share is not None}


RankRule = Ratio | Energy | Evbmf | Plan


def rounded(rank: int, most: int, multiple: int) -> int:
    """Returns a rank rounded up to a multiple, at most `most`."""
    return min(most, math.ceil(rank / multiple) * multiple)


def make_spec(site: Site, rank_in: int, rank_out: int, round_to: int) -> Factorised:
    """Returns a Tucker-2 form with ranks that are rounded up, and possible."""
    most_in, most_out = max_ranks(site.kernel.shape, groups=site.groups)
    return Tucker2(
        rounded(max(1, rank_in), most_in, round_to),
        rounded(max(1, rank_out), most_out, round_to),
        core=site.core,
    )


def low_rank_spec(site: Site, rank: int, round_to: int) -> Factorised:
    """Returns two factors with a rank that is rounded up, and possible."""
    most = min(max_ranks(site.kernel.shape, groups=site.groups))
    return LowRank(rounded(max(1, rank), most, round_to))


def rank_by_rule(
    rule: RankRule, site: Site, kernel: np.ndarray, *, round_to: int
) -> Conv | Factorised:
    """Returns what a rule makes of one convolution.

    Args:
        rule: Any but a `Budget`.
        site: The convolution.
        kernel: Its kernel, weighed by its inputs where they are known.
        round_to: Ranks become multiples of it, rounded up.

    Raises:
        ValueError: A plan whose ranks the layer cannot have.
    """
    if isinstance(rule, Plan):
        return _by_plan(rule, site)
    if isinstance(rule, Ratio):
        _, _, c_in, c_out = kernel.shape
        rank_in = int(c_in * rule.ratio)
        rank_out = int(c_out // site.groups * rule.ratio)
        return make_spec(site, rank_in, rank_out, round_to)
    groups = list(split_groups(kernel, site.groups))
    # Of several groups, the one that needs most.
    if site.is_pointwise:
        if isinstance(rule, Energy):
            ranks = [energy_rank(mode_spectra(part)[0], rule.share) for part in groups]
        else:
            ranks = [evbmf_rank(unfold_in(part)) for part in groups]
        return low_rank_spec(site, max(ranks), round_to)
    if isinstance(rule, Energy):
        spectra = [mode_spectra(part) for part in groups]
        pairs = [
            (energy_rank(s_in, rule.share), energy_rank(s_out, rule.share))
            for s_in, s_out in spectra
        ]
    else:
        pairs = [
            (evbmf_rank(unfold_in(part)), evbmf_rank(unfold_out(part)))
            for part in groups
        ]
    ranks_in, ranks_out = zip(*pairs, strict=True)
    return make_spec(site, max(ranks_in), max(ranks_out), round_to)


def _by_plan(plan: Plan, site: Site) -> Conv | Factorised:
    if not any(fnmatch.fnmatchcase(site.path, glob) for glob, _ in plan.rules):
        return site.spec
    spec = plan.spec(site.path)
    kh, kw, c_in, c_out = site.kernel.shape
    limits: dict[str, int] = {}
    if isinstance(spec, Tucker2):
        limits = {"rank_in": c_in, "rank_out": c_out // site.groups}
    elif isinstance(spec, LowRank):
        if not site.is_pointwise:
            raise ValueError(
                f"`ranks` has {spec} at {site.path!r}, whose filters are {kh} x {kw}; "
                f"must be 1 x 1."
            )
        limits = {"rank": min(c_in, c_out // site.groups)}
    elif not isinstance(spec, Conv):
        raise ValueError(f"`ranks` has {spec}; must hold Tucker2, LowRank and Conv.")
    for name, most in limits.items():
        rank = getattr(spec, name)
        if rank > most:
            raise ValueError(
                f"`{name}` (={rank}) of {site.path!r} must be in [1, {most}]."
            )
    if isinstance(spec, Tucker2):
        if spec.core not in (Conv(), site.core):
            raise ValueError(f"`ranks` has {spec}; its core must be {site.core}.")
        return make_spec(site, spec.rank_in, spec.rank_out, 1)
    return site.core if isinstance(spec, Conv) else spec


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
) -> dict[str, Conv | Factorised] | None:
    """Returns the forms of least summed error within a budget; None if there are none.

    Errors are taken for additive. On hulls, the best is to take steps to cheaper forms
    in the order of error added for cost saved, until the budget is met.

    Args:
        choices: Of each convolution.
        fixed: Cost of all else.
        budget: Of everything.
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
        return None
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
