"""Rules that choose the ranks of a network's convolutions."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from inertia_jax.chips.chip import find_chip
from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.layers.kinds import kind_of, ranks_of
from inertia_jax.ops.tucker.rank_selection import energy_rank, evbmf_rank, mode_spectra
from inertia_jax.ops.tucker.unfold import max_ranks, split_groups, unfold_in, unfold_out
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.specs import Conv, LowRank, Tucker2, as_python

# Sums of costs are equal up to this share.
ROUNDING = 1e-12


def _set_share(rule: object, name: str) -> None:
    value = as_python(getattr(rule, name))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(f"`{name}` (={value!r}) must be in (0, 1].")
    object.__setattr__(rule, name, value)


def check_reachable(
    name: str, share: float, least: float, *, state: str, forms: str
) -> None:
    """Raises ValueError where a share of the cost is below the least possible one.

    Args:
        name: The name of the cost.
        share: The share that is asked for.
        least: The least share.
        state: What the network is in that takes it, e.g. "every tile closed".
        forms: What layers may have, e.g. "tiles".
    """
    if least <= share * (1 + ROUNDING):
        return
    # The share is rounded up, because the share that is named must be reachable.
    least = math.ceil(1e4 * least) / 1e4
    rule = f"must be at least {least:.4f}, the share with {state}"
    if least >= 1:
        rule = f"is met by no {forms}: with {state}, the share is {least:.4f}"
    raise ValueError(f"`{name}` (={share}) {rule}.")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The rule that ranks are `max(1, int(channels * ratio))` everywhere.

    1x1 convolutions become Tucker-2 too. A linear layer takes the smaller rank.

    Attributes:
        ratio: The share of the channels, in (0, 1].

    Example:
        >>> small, _ = ij.compress(
        ...     model, variables, ranks=ij.Ratio(0.5), only_cheaper=False
        ... )
        >>> small.plan.spec("conv2").rank_in, small.plan.spec("conv2").rank_out
        (1, 2)
    """

    ratio: float

    def __post_init__(self) -> None:
        _set_share(self, "ratio")


@dataclasses.dataclass(frozen=True)
class Energy:
    """The rule of least ranks that keep a share of each unfolding's energy.

    The energy is the sum of the squared singular values.

    Attributes:
        share: The share to keep, in (0, 1].

    Example:
        >>> small, _ = ij.compress(
        ...     model, variables, ranks=ij.Energy(0.5), only_cheaper=False
        ... )
        >>> small.plan.spec("conv2").rank_out
        2
    """

    share: float

    def __post_init__(self) -> None:
        _set_share(self, "share")


@dataclasses.dataclass(frozen=True)
class Evbmf:
    """The rule that ranks are those that empirical variational Bayes finds, at least 1.

    It is applied to each unfolding of the kernel.

    Example:
        >>> small, _ = ij.compress(
        ...     model, variables, ranks=ij.Evbmf(), only_cheaper=False
        ... )
        >>> small.plan.spec("conv2").rank_out
        1

    References:
        Kim et al., 2016, https://arxiv.org/abs/1511.06530, section 3.2
    """


@dataclasses.dataclass(frozen=True)
class Budget:
    """The rule that all ranks together have the least error at a share of the cost.

    One of the three shares must be given.

    Attributes:
        macs: The share of the dense network's multiply-accumulates, in (0, 1].
        params: The share of its parameters, in (0, 1].
        latency: The share of its time, in (0, 1], measured on this machine, or that on
            `device`. The times of single layers choose between ranks; the time of the
            whole network decides whether they keep to the share.
        batch_size: Images per call where latency is measured, >= 1.
        device: The chip on which latency counts, such as "v5e" (`CHIPS`), which need
            not be there: its compiler estimates the time of networks and of the layers
            in them, in bfloat16. It needs libtpu (the extra `tpu`). None: this machine.

    Example:
        >>> small, _ = ij.compress(model, variables, ranks=ij.Budget(params=0.99))
        >>> cost = ij.count_cost(small, (28, 28, 1))
        >>> cost.params <= 0.99 * ij.count_cost(model, (28, 28, 1)).params
        True
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    batch_size: int = 64
    device: str | None = None

    def __post_init__(self) -> None:
        given = self._given
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` (={self.batch_size}) must be >= 1.")
        if len(given) != 1:
            raise ValueError(
                f"a Budget must have one of macs, params and latency; it has {given}."
            )
        _set_share(self, next(iter(given)))
        if self.device is not None:
            find_chip(self.device)
            if self.latency is None:
                raise ValueError(
                    f"`device` (={self.device!r}) must be None without `latency`."
                )

    @property
    def of(self) -> str:
        """The name of the given share: `macs`, `params` or `latency`."""
        return next(iter(self._given))

    @property
    def share(self) -> float:
        """The share of the cost that may be taken."""
        return next(iter(self._given.values()))

    @property
    def _given(self) -> dict[str, float]:
        shares = {"macs": self.macs, "params": self.params, "latency": self.latency}
        return {name: share for name, share in shares.items() if share is not None}


RankRule = Ratio | Energy | Evbmf | Plan


def rounded(rank: int, most: int, multiple: int) -> int:
    """Returns a rank rounded up to a multiple, at most `most`."""
    return min(most, math.ceil(rank / multiple) * multiple)


def _make_spec(site: Site, ranks: Iterable[int], round_to: int) -> Factorised:
    """Returns the form with one rank or two, rounded up and within their limits."""
    positive = [max(1, rank) for rank in ranks]
    most = max_ranks(site.kernel.shape, groups=site.groups)
    if len(positive) == 1:
        return LowRank(rounded(positive[0], min(most), round_to))
    rank_in, rank_out = (
        rounded(*pair, round_to) for pair in zip(positive, most, strict=True)
    )
    return Tucker2(rank_in, rank_out, core=site.core)


def rank_by_rule(
    rule: RankRule, site: Site, kernel: np.ndarray, *, round_to: int
) -> Conv | Factorised:
    """Returns the form that a rule gives one convolution.

    Args:
        rule: The rule.
        site: The convolution.
        kernel: Its kernel, weighed by its inputs where they are known.
        round_to: The number that ranks are rounded up to multiples of.

    Raises:
        ValueError: A plan whose ranks the layer cannot have.
    """
    if isinstance(rule, Plan):
        return _by_plan(rule, site)
    if isinstance(rule, Ratio):
        *_, c_in, c_out = kernel.shape
        shares = [c_in * rule.ratio, c_out // site.groups * rule.ratio]
        if site.is_linear:
            shares = [min(shares)]
        return _make_spec(site, map(int, shares), round_to)
    modes = 1 if site.is_pointwise else 2
    ranks = []
    for part in split_groups(kernel, site.groups):
        if isinstance(rule, Energy):
            spectra = mode_spectra(part)[:modes]
            ranks.append([energy_rank(spectrum, rule.share) for spectrum in spectra])
        else:
            unfoldings = (unfold_in, unfold_out)[:modes]
            ranks.append([evbmf_rank(unfold(part)) for unfold in unfoldings])
    # The group that needs the highest rank decides for all groups.
    return _make_spec(site, map(max, zip(*ranks, strict=True)), round_to)


def _by_plan(plan: Plan, site: Site) -> Conv | Factorised:
    if plan.rule(site.path) is None:
        return site.spec
    spec = plan.spec(site.path)
    *sides, c_in, c_out = site.kernel.shape
    if not isinstance(spec, Conv | Tucker2 | LowRank):
        raise ValueError(f"`ranks` has {spec}; must hold Tucker2, LowRank and Conv.")
    if isinstance(spec, LowRank) and not site.is_pointwise:
        raise ValueError(
            f"`ranks` has {spec} at {site.path!r}, whose filters are "
            f"{' x '.join(map(str, sides))}; must be {' x '.join('1' * len(sides))}."
        )
    if isinstance(spec, Tucker2) and site.is_linear:
        raise ValueError(
            f"`ranks` has {spec} at {site.path!r}, a linear layer; must be a LowRank."
        )
    c_out //= site.groups
    limits = {"rank_in": c_in, "rank_out": c_out, "rank": min(c_in, c_out)}
    for name, rank in zip(kind_of(spec).ranks, ranks_of(spec), strict=True):
        if rank > (most := limits[name]):
            raise ValueError(
                f"`{name}` (={rank}) of {site.path!r} must be in [1, {most}]."
            )
    if isinstance(spec, Tucker2):
        if spec.core not in (Conv(), site.core):
            raise ValueError(f"`ranks` has {spec}; its core must be {site.core}.")
        return _make_spec(site, ranks_of(spec), 1)
    return site.core if isinstance(spec, Conv) else spec
