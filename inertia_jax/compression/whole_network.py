"""A budget of latency that the whole network keeps, not the sum of its layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from inertia_jax.calls import Network
from inertia_jax.compression.planned import with_rules
from inertia_jax.compression.sites import Factorised, Site, leaves_at, with_leaves
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.layers.kinds import bias_of, kind_of
from inertia_jax.plan.specs import Conv

# A network is near enough if it takes at least this part of the share.
_NEAR = 0.97
# The most networks that are compiled and timed, but for one more where none of them
# keeps to the share.
_ROUNDS = 4
# The most allowances that are tried for them, several of which may choose alike.
_TRIES = 16


class Choice(NamedTuple):
    """The form of every convolution that may change, and the kernels of its factors."""

    specs: dict[str, Conv | Factorised]
    kernels: Mapping[str, WeighedKernel]


class Allowance(NamedTuple):
    """The time that layers may take by themselves, and what the network then takes.

    Attributes:
        ms: The sum over the layers, in milliseconds.
        share: The share of the dense network's time that the whole network takes.
    """

    ms: float
    share: float


def choice_within(
    share: float,
    choose: Callable[[float], Choice],
    share_of: Callable[[Choice], float],
    *,
    least_ms: float,
    most: Allowance,
    progress: Callable[[int, int], None],
) -> tuple[Choice, float]:
    """Returns the choice whose whole network takes most of a share, and that share.

    Layers take other times by themselves than in their network, where a compiler joins
    them and keeps what lies between them near. So the whole network is timed with the
    forms that an allowance chooses, and the next allowance lies between those known to
    be too small and too large, in proportion to what they have led to. Where no network
    keeps to the share, it is the choice of the least allowance.

    Args:
        share: The share of the dense network's time that may be taken.
        choose: The function from an allowance, in milliseconds, to the choice.
        share_of: The function from a choice to the share that its network takes.
        least_ms: The allowance of the cheapest forms.
        most: The allowance at which nothing changes, whose network exceeds the share.
        progress: A function that is told how many networks are timed, and the most.
    """
    known: dict[Any, float] = {}

    def timed(ms: float) -> tuple[Allowance, Choice]:
        choice = choose(ms)
        key = tuple(choice.specs.items())
        if key not in known:
            progress(min(len(known), _ROUNDS - 1), _ROUNDS)
            known[key] = share_of(choice)
        return Allowance(ms, known[key]), choice

    aim = share * (1 + _NEAR) / 2
    over, under, part = most, None, 1.0
    for _ in range(_TRIES):
        if under is None:
            if over.ms <= least_ms:
                break
            # The line through the origin at first, then through both.
            base = Allowance(0.0, 0.0) if over is most else most
            slope = (base.share - over.share) / (base.ms - over.ms)
            ms = over.ms - (over.share - aim) / slope if slope > 0 else least_ms
            ms = max(ms, least_ms)
        else:
            ms = under.ms + min(max(part, 0.1), 0.9) * (over.ms - under.ms)
        count = len(known)
        now, choice = timed(ms)
        if now.share > share:
            over = now
        else:
            under, best = now, choice
        if len(known) == _ROUNDS or (under and under.share >= _NEAR * share):
            break
        if under is not None:
            part = (aim - under.share) / (over.share - under.share)
            # Where a choice is made again, its neighbours are far from it.
            part = part if len(known) > count else 0.5
    if under is None:
        under, best = timed(least_ms)
    progress(_ROUNDS, _ROUNDS)
    return best, under.share


def network_in(
    network: Network, sites: Mapping[str, Site], specs: Mapping[str, Conv | Factorised]
) -> Network:
    """Returns a network with layers in other forms, whose kernels are drawn anew.

    Its time is that of the network with real factors, which take seconds to compute.

    Args:
        network: The network.
        sites: Its convolutions that may change, by path.
        specs: Their forms, by path.
    """
    model, variables = network
    changed = {path: s for path, s in specs.items() if s != sites[path].spec}
    rng, leaves = np.random.default_rng(0), {}
    for path, spec in changed.items():
        old = leaves_at(variables, path)
        dtype = next(iter(old.values())).dtype
        new = {}
        for part, shape in zip(
            kind_of(spec).parts, sites[path].kernel_shapes(spec), strict=True
        ):
            # Outputs are of the size of the inputs.
            kernel = rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]))
            new[f"{part}/kernel"] = jnp.asarray(kernel, dtype)
        if (bias := bias_of(old)) is not None:
            new[f"{part}/bias"] = bias
        leaves[path] = new
    return with_rules(model, changed), with_leaves(variables, leaves)
