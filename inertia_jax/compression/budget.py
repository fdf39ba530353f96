"""Chooses all ranks of a network jointly, for the least error within a budget."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.calls import ApplyFn, Network
from inertia_jax.compression.allocation import (
    Forms,
    all_forms,
    allocate,
    lower_hull,
    make_choices,
    make_grid,
    spend_rest,
)
from inertia_jax.compression.calibration import divergence_of
from inertia_jax.compression.latency import model_latency_ms, site_latencies_ms
from inertia_jax.compression.probes import measured_errors, with_forms
from inertia_jax.compression.ranks import Budget
from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.cost.count import count_one
from inertia_jax.inputs import Shape
from inertia_jax.layers.kinds import ranks_of
from inertia_jax.ops.tucker.tucker import Method
from inertia_jax.plan.specs import Conv
from inertia_jax.progress import Progress, counted

# The most forms of a layer whose latency is measured.
_TIMED_FORMS = 8
# The ranks that are compiled for a chip, as shares of the most, each side's with the
# same of the other side or that two steps away.
_COMPILED_SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# Chips take channels by eights at least.
_CHIP_MULTIPLE = 8

Costs = dict[str, Callable[[Conv | Factorised], float]]


class Way(NamedTuple):
    """A way to choose ranks: what the forms of each layer are, and cost in error.

    Attributes:
        kernels: The convolutions that may change, by path.
        grids: Their forms, with the shares of energy that they lose.
        errors: For each layer, the function from these to the error to minimise.
    """

    kernels: Mapping[str, WeighedKernel]
    grids: Mapping[str, Forms]
    errors: Mapping[str, Callable[[np.ndarray], np.ndarray]]


def choose_ranks(
    budget: Budget,
    now: Network,
    dense: Network,
    kernels: Mapping[str, WeighedKernel],
    batches: list[Any],
    *,
    image_shape: Shape,
    round_to: int,
    method: Method,
    apply_fn: ApplyFn | None,
    progress: Progress | None,
) -> tuple[dict[str, Conv | Factorised], Mapping[str, WeighedKernel]]:
    """Returns the form of every convolution, and the kernels that its factors are of.

    With images, ranks are chosen in three ways: by the divergence that they measure for
    each layer, by the errors of kernels weighed by inputs, and by those of the kernels
    alone, as without images. Errors of layers do not add up, so that no way is always
    best: the choice is taken whose network diverges least on the images.

    Args:
        budget: The share of the dense network's cost that may be taken.
        now: The network as it is.
        dense: The network with its factors multiplied out.
        kernels: The convolutions that may change, by path.
        batches: Batches of the network's inputs; without any, the relative errors of
            the kernels are summed.
        image_shape: The shape of one input.
        round_to: The number that ranks become multiples of.
        method: The method of `ops.tucker2`.
        apply_fn: How the network is called, as in `compress`.
        progress: A function that is told how many layers are done, as in `compress`.

    Raises:
        ValueError: A budget that no ranks can meet (the message says the least
            possible), or images on which no choice's outputs are finite.
    """
    sites = {path: kernel.site for path, kernel in kernels.items()}
    if budget.device is not None:
        round_to = math.lcm(round_to, _CHIP_MULTIPLE)
    plain = {path: WeighedKernel(site) for path, site in sites.items()}
    energies = dict.fromkeys(sites, lambda lost: lost)
    ways = [
        Way(each, _grids(each, round_to), energies)
        for each in ([kernels, plain] if batches else [kernels])
    ]
    if budget.of == "latency":
        ways = _thinned(sites, ways, budget)
        costs = _latencies(budget, dense[0], sites, ways[0].grids, progress)
        if budget.device is not None:
            _warn_of_slower(budget.device, sites, ways[0].grids, costs)
    else:
        costs = {
            path: (site.macs if budget.of == "macs" else site.params)
            for path, site in sites.items()
        }
    total = present = _cost(budget, dense, image_shape, apply_fn)
    if now[0] is not dense[0]:
        present = _cost(budget, now, image_shape, apply_fn)
    # Layers measured one by one may take longer than the whole network. The share is
    # taken of the larger total.
    total = max(total, sum(cost_of(Conv()) for cost_of in costs.values()))
    # The present cost of the network contains the cost of the layers.
    taken = sum(cost_of(sites[path].spec) for path, cost_of in costs.items())
    fixed = max(0.0, present - taken)
    lowest = fixed + sum(
        min(map(cost_of, (sites[path].spec, *ways[0].grids[path].specs)))
        for path, cost_of in costs.items()
    )
    if lowest > budget.share * total * (1 + 1e-12):
        # The share is rounded up, because the share that is named must be reachable.
        share = math.ceil(1e4 * lowest / total) / 1e4
        raise ValueError(
            f"`{budget.of}` (={budget.share}) must be at least {share:.4f}, the share "
            f"with every rank the least possible."
        )

    def specs_of(way: Way) -> dict[str, Conv | Factorised]:
        forms = {
            path: all_forms(
                site, way.grids[path], cost_of=costs[path], error_of=way.errors[path]
            )
            for path, site in sites.items()
        }
        choices = {path: make_choices(every) for path, every in forms.items()}
        specs = allocate(choices, fixed=fixed, budget=budget.share * total)
        taken = sum(cost_of(specs[path]) for path, cost_of in costs.items())
        return spend_rest(specs, forms, budget.share * total - fixed - taken)

    if not batches:
        return specs_of(ways[0]), kernels
    divergence = divergence_of(*dense, batches, apply_fn)
    measured = measured_errors(dense, kernels, ways[0].grids, divergence, progress)
    ways.insert(0, ways[0]._replace(errors=measured))
    found = [(specs_of(way), way.kernels) for way in ways]
    divergences = [divergence(with_forms(dense[1], *p, method=method)) for p in found]
    return found[least(divergences)]


def least(divergences: Sequence[float]) -> int:
    """Returns the place of the least divergence; none that is not finite is least.

    Raises:
        ValueError: None is finite.
    """
    finite = [d if math.isfinite(d) else math.inf for d in divergences]
    if min(finite) == math.inf:
        raise ValueError(
            f"`calibration` must leave the outputs of the compressed network finite; "
            f"their divergences are {divergences}."
        )
    return finite.index(min(finite))


def _grids(kernels: Mapping[str, WeighedKernel], round_to: int) -> dict[str, Forms]:
    return {
        path: make_grid(kernel.site, kernel.kernel, round_to=round_to)
        for path, kernel in kernels.items()
    }


def _cost(
    budget: Budget,
    network: Network,
    image_shape: Shape,
    apply_fn: ApplyFn | None,
) -> float:
    """Returns the cost of a whole network, in the units of the budget."""
    if budget.of == "latency":
        return model_latency_ms(
            *network,
            image_shape,
            batch_size=budget.batch_size,
            apply_fn=apply_fn,
            device=budget.device,
        )
    table = count_one(network[0], image_shape, apply_fn=apply_fn)
    return float(table.macs if budget.of == "macs" else table.params)


def _thinned(sites: Mapping[str, Site], ways: list[Way], budget: Budget) -> list[Way]:
    """Returns the ways with a few forms that take fewer MACs than the dense ones.

    They are on the hulls, where they are measured, or the same for all layers of one
    geometry, where they are compiled, which takes seconds each.
    """
    kept: dict[str, list[int]] = {}
    for path, site in sites.items():
        if budget.device is not None:
            kept[path] = _to_compile(site, ways[0].grids[path])
            continue
        places: set[int] = set()
        for way in ways:
            grid = way.grids[path]
            hull = [
                i
                for i in lower_hull(grid.costs, grid.errors)
                if grid.costs[i] < site.macs(Conv())
            ]
            steps = np.linspace(0, len(hull) - 1, min(_TIMED_FORMS, len(hull)))
            places |= {hull[round(step)] for step in steps}
        kept[path] = sorted(places)
    return [
        way._replace(grids={path: way.grids[path].take(kept[path]) for path in kept})
        for way in ways
    ]


def _to_compile(site: Site, grid: Forms) -> list[int]:
    """Returns the places of the forms that are compiled, by `_COMPILED_SHARES`."""
    ranks = [ranks_of(spec) for spec in grid.specs]
    near = []
    for side in map(np.unique, zip(*ranks, strict=True)):
        wanted = np.asarray(_COMPILED_SHARES) * side[-1]
        near.append(side[np.abs(side[:, None] - wanted).argmin(axis=0)])
    steps = itertools.product(range(len(_COMPILED_SHARES)), repeat=len(near))
    pairs = {
        tuple(side[i] for side, i in zip(near, step, strict=True))
        for step in steps
        if max(step) - min(step) in (0, 2)
    }
    is_less = grid.costs < site.macs(Conv())
    return [i for i, pair in enumerate(ranks) if pair in pairs and is_less[i]]


def _warn_of_slower(
    device: str, sites: Mapping[str, Site], grids: Mapping[str, Forms], costs: Costs
) -> None:
    """Warns of the layers that no form makes faster."""
    slower = [
        path
        for path, site in sites.items()
        if costs[path](site.spec)
        <= min(map(costs[path], grids[path].specs), default=math.inf)
    ]
    if slower:
        warnings.warn(
            f"these layers stay as they are, since no form of them is faster on "
            f"{device}, as its compiler estimates: {', '.join(slower)}.",
            stacklevel=5,
        )


def _latencies(
    budget: Budget,
    model: nn.Module,
    sites: Mapping[str, Site],
    grids: Mapping[str, Forms],
    progress: Progress | None,
) -> Costs:
    """Returns, for each layer, the time in milliseconds as a function of the form."""
    dtype = getattr(model, "dtype", None) or jnp.float32
    measured: dict[Any, dict[Any, float]] = {}
    costs: Costs = {}
    what = "timing layers" if budget.device is None else "compiling layers"
    for path, site in counted(sites.items(), progress, what):
        # Layers of one geometry are measured once.
        times = measured.setdefault(site.geometry, {})
        wanted = dict.fromkeys([Conv(), site.spec, *grids[path].specs])
        new = [spec for spec in wanted if spec not in times]
        found = site_latencies_ms(
            site,
            new,
            batch_size=budget.batch_size,
            dtype=dtype,
            device=budget.device,
        )
        times.update(zip(new, found, strict=True))
        costs[path] = times.__getitem__
    return costs
