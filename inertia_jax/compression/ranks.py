"""Rules that choose the ranks of a network's convolutions."""

import dataclasses
import fnmatch
import math

import numpy as np

from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.ops.tucker.rank_selection import energy_rank, evbmf_rank, mode_spectra
from inertia_jax.ops.tucker.unfold import max_ranks, split_groups, unfold_in, unfold_out
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.specs import Conv, LowRank, Tucker2, as_python


def _set_share(rule: object, name: str) -> None:
    value = as_python(getattr(rule, name))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(f"`{name}` (={value!r}) must be in (0, 1].")
    object.__setattr__(rule, name, value)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The rule that ranks are `max(1, int(channels * ratio))` everywhere.

    1x1 convolutions become Tucker-2, too.

    Attributes:
        ratio: The share of the channels, in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        _set_share(self, "ratio")


@dataclasses.dataclass(frozen=True)
class Energy:
    """The least ranks that keep a share of each unfolding's squared singular values.

    Attributes:
        share: The share to keep, in (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        _set_share(self, "share")


@dataclasses.dataclass(frozen=True)
class Evbmf:
    """The ranks that empirical variational Bayes finds in each unfolding, at least 1.

    References:
        Kim et al., 2016, https://arxiv.org/abs/1511.06530, section 3.2
    """


@dataclasses.dataclass(frozen=True)
class Budget:
    """All ranks together, for the least error at a share of the network's cost.

    One of the three shares must be given.

    Attributes:
        macs: The share of the dense network's multiply-accumulates, in (0, 1].
        params: The share of its parameters.
        latency: The share of its time on this machine, layer by layer as measured.
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
        _set_share(self, next(iter(given)))

    @property
    def of(self) -> str:
        """`macs`, `params` or `latency`."""
        return next(iter(self._given))

    @property
    def share(self) -> float:
        """The share to keep."""
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
    """Returns the form that a rule gives one convolution.

    Args:
        rule: The rule.
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
    # The group that needs most decides for all.
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
