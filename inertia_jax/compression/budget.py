"""Chooses all ranks of a network jointly, for the least error within a budget."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from inertia_jax.calls import ApplyFn, Network
from inertia_jax.compression.allocation import (
    Forms,
    all_forms,
    allocate,
    make_choices,
    make_grid,
    spend_rest,
)
from inertia_jax.compression.calibration import divergence_of
from inertia_jax.compression.chip_times import chip_times
from inertia_jax.compression.latency import network_latencies_ms
from inertia_jax.compression.layer_times import (
    LayerTimes,
    estimated_times,
    measured_times,
)
from inertia_jax.compression.probes import measured_errors, with_forms
from inertia_jax.compression.ranks import Budget, check_reachable
from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.compression.whole_network import (
    Allowance,
    Choice,
    choice_within,
    network_in,
)
from inertia_jax.cost.count import count_one
from inertia_jax.inputs import Shape
from inertia_jax.ops.tucker.tucker import Method
from inertia_jax.plan.specs import Conv
from inertia_jax.progress import Progress

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
) -> Choice:
    """Returns the form of every convolution, and the kernels that its factors are of.

    With images, ranks are chosen in three ways: by the divergence that they measure for
    each layer, by the errors of kernels weighed by inputs, and by those of the kernels
    alone, as without images. Errors of layers do not add up, so that no way is always
    best: the choice is taken whose network diverges least on the images.

    Latencies of layers do not add up either: the time of the whole network decides, as
    in `choice_within`.

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
    whole = functools.partial(
        _whole_costs, budget, image_shape=image_shape, apply_fn=apply_fn
    )
    is_dense = now[0] is dense[0]
    total, present = whole([dense]) * 2 if is_dense else whole([dense, now])
    costs: Costs
    if budget.of == "latency":
        if present <= budget.share * total:
            return Choice({path: site.spec for path, site in sites.items()}, kernels)
        grids = [way.grids for way in ways]
        if budget.device is None:
            times = measured_times(budget, dense[0], sites, grids, progress)
        else:
            times = estimated_times(
                budget, (dense, now), sites, grids[0], image_shape, apply_fn, progress
            )
        ways = [_with_forms(way, times) for way in ways]
        costs = {path: by_spec.__getitem__ for path, by_spec in times.items()}
    else:
        costs = {
            path: (site.macs if budget.of == "macs" else site.params)
            for path, site in sites.items()
        }
    # The present cost of the network contains the cost of the layers.
    taken = sum(cost_of(sites[path].spec) for path, cost_of in costs.items())
    fixed = max(0.0, present - taken)
    cheapest = {
        path: min((sites[path].spec, *ways[0].grids[path].specs), key=cost_of)
        for path, cost_of in costs.items()
    }
    lowest = fixed + sum(cost_of(cheapest[path]) for path, cost_of in costs.items())

    def share_of(specs: Mapping[str, Conv | Factorised]) -> float:
        dense_cost, cost = whole([dense, network_in(now, sites, specs)])
        return cost / dense_cost

    if budget.of != "latency":
        _check(budget, lowest / total)
    elif lowest / (fixed + taken) * present / total > budget.share:
        # The layers say that the budget cannot be met; the network decides.
        stays = all(cheapest[path] == sites[path].spec for path in cheapest)
        _check(budget, present / total if stays else share_of(cheapest))
    diverges = None
    if batches:
        divergence = divergence_of(*dense, batches, apply_fn)
        measured = measured_errors(dense, kernels, ways[0].grids, divergence, progress)
        ways.insert(0, ways[0]._replace(errors=measured))

        def diverges(choice: Choice) -> float:
            return divergence(with_forms(dense[1], *choice, method=method))

    choose = _chooser(ways, sites, costs, fixed, diverges)
    if budget.of != "latency":
        return choose(budget.share * total)
    what = f"{'timing' if budget.device is None else 'compiling'} networks"
    found, reached = choice_within(
        budget.share,
        choose,
        lambda choice: share_of(choice.specs),
        least_ms=lowest * (1 + 1e-9),  # sums are rounded
        most=Allowance(fixed + taken, present / total),
        progress=lambda *counts: progress(what, *counts) if progress else None,
    )
    _check(budget, reached)
    return found


def _check(budget: Budget, least: float) -> None:
    """Raises ValueError where a budget is below the least share of the cost."""
    state = "each layer in its fastest form"
    if budget.of != "latency":
        state = "every rank the least possible"
    check_reachable(budget.of, budget.share, least, state=state, forms="ranks")


def _whole_costs(
    budget: Budget,
    networks: Sequence[Network],
    *,
    image_shape: Shape,
    apply_fn: ApplyFn | None,
) -> list[float]:
    """Returns the cost of each network, in the units of the budget."""
    if budget.device is not None:
        return [
            chip_times(
                network,
                image_shape,
                device=budget.device,
                batch_size=budget.batch_size,
                apply_fn=apply_fn,
            ).ms
            for network in networks
        ]
    if budget.of == "latency":
        return network_latencies_ms(
            networks, image_shape, batch_size=budget.batch_size, apply_fn=apply_fn
        )
    tables = [count_one(model, image_shape, apply_fn=apply_fn) for model, _ in networks]
    return [float(t.macs if budget.of == "macs" else t.params) for t in tables]


def _with_forms(way: Way, times: LayerTimes) -> Way:
    """Returns a way whose layers have the forms alone whose times are known."""
    grids = {
        path: grid.take(i for i, spec in enumerate(grid.specs) if spec in times[path])
        for path, grid in way.grids.items()
    }
    return way._replace(grids=grids)


def _chooser(
    ways: Sequence[Way],
    sites: Mapping[str, Site],
    costs: Costs,
    fixed: float,
    divergence: Callable[[Choice], float] | None,
) -> Callable[[float], Choice]:
    """Returns the function from a cost to the best choice that costs no more.

    Args:
        ways: The ways to choose.
        sites: The convolutions that may change, by path.
        costs: For each of them, the cost as a function of the form.
        fixed: The cost of everything else.
        divergence: What says which way has led to the best choice, where there are
            several.
    """
    forms = [
        {
            path: all_forms(
                site, way.grids[path], cost_of=costs[path], error_of=way.errors[path]
            )
            for path, site in sites.items()
        }
        for way in ways
    ]

    def choose(budget: float) -> Choice:
        found = []
        for way, every in zip(ways, forms, strict=True):
            choices = {path: make_choices(each) for path, each in every.items()}
            specs = allocate(choices, fixed=fixed, budget=budget)
            taken = sum(cost_of(specs[path]) for path, cost_of in costs.items())
            specs = spend_rest(specs, every, budget - fixed - taken)
            found.append(Choice(specs, way.kernels))
        if divergence is None:
            return found[0]
        return found[least([divergence(choice) for choice in found])]

    return choose


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
