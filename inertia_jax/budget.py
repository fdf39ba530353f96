"""All ranks of a network together, for the least error within a budget."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.allocation import (
    RankGrid,
    all_forms,
    allocate,
    make_choices,
    make_grid,
    spend_rest,
)
from inertia_jax.calibration import divergence_of
from inertia_jax.cost import count_cost
from inertia_jax.factorise import WeighedKernel
from inertia_jax.latency import model_latency_ms, site_latencies_ms
from inertia_jax.ops.ranks import lower_hull
from inertia_jax.ranks import Budget
from inertia_jax.sites import Factorised, Site, leaves_at, with_leaves
from inertia_jax.specs import Conv

# Lost shares of energy at which a layer's effect on the outputs is measured.
_PROBES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6)
# Forms of a layer whose latency is measured, from the least MACs to the most.
_TIMED_FORMS = 8

Costs = dict[str, Callable[[Conv | Factorised], float]]


def choose_ranks(
    budget: Budget,
    now: tuple[nn.Module, Mapping[str, Any]],
    dense: tuple[nn.Module, Mapping[str, Any]],
    kernels: Mapping[str, WeighedKernel],
    batches: list[np.ndarray],
    *,
    image_shape: tuple[int, ...],
    round_to: int,
) -> dict[str, Conv | Factorised]:
    """Returns the form of every convolution.

    Args:
        budget: What to keep to.
        now: The network as it is, and its variables.
        dense: With its factors multiplied out: shares are of its cost.
        kernels: The convolutions that may change, by path, as they stand.
        batches: Of its inputs; empty: relative errors are summed instead.
        image_shape: [h, w, c].
        round_to: Ranks become multiples of it.

    Raises:
        ValueError: A budget that no ranks can meet; says the least possible.
    """
    sites = {path: of.site for path, of in kernels.items()}
    grids = {
        path: make_grid(of.site, of.kernel, round_to=round_to)
        for path, of in kernels.items()
    }
    if budget.of == "latency":
        grids = {path: _thinned(sites[path], grid) for path, grid in grids.items()}
        costs = _latencies(budget, dense[0], sites, grids)
    else:
        costs = {
            path: (site.macs if budget.of == "macs" else site.params)
            for path, site in sites.items()
        }
    total = _cost(budget, *dense, image_shape)
    present = total if now[0] is dense[0] else _cost(budget, *now, image_shape)
    # Timed one by one, layers may take longer than the network; a share is of both.
    total = max(total, sum(cost(Conv()) for cost in costs.values()))
    # What the layers take as they are, the network's cost counts too.
    taken = sum(cost(sites[path].spec) for path, cost in costs.items())
    fixed = max(0.0, present - taken)
    cheapest = {
        path: min(cost(spec) for spec in (sites[path].spec, *grids[path].specs))
        for path, cost in costs.items()
    }
    least = fixed + sum(cheapest.values())
    if least > budget.share * total * (1 + 1e-12):
        # Rounded up: the share that is named must be one that can be met.
        share = math.ceil(1e4 * least / total) / 1e4
        raise ValueError(
            f"`{budget.of}` (={budget.share}) must be at least {share:.4f}, the share "
            f"with every rank the least possible."
        )
    errors = {path: lambda lost: lost for path in sites}
    if batches:
        errors = _measured_errors(*dense, kernels, grids, batches)
    forms = {
        path: all_forms(site, grids[path], cost=costs[path], error=errors[path])
        for path, site in sites.items()
    }
    choices = {path: make_choices(of) for path, of in forms.items()}
    specs = allocate(choices, fixed=fixed, budget=budget.share * total)
    taken = sum(cost(specs[path]) for path, cost in costs.items())
    return spend_rest(specs, forms, budget.share * total - fixed - taken)


def _cost(
    budget: Budget,
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, ...],
) -> float:
    """Returns the cost of a whole network, in the units of the budget."""
    if budget.of == "latency":
        return model_latency_ms(
            model, variables, image_shape, batch_size=budget.batch_size
        )
    table = count_cost(model, image_shape)
    return float(table.macs if budget.of == "macs" else table.params)


def _thinned(site: Site, grid: RankGrid) -> RankGrid:
    """Keeps the forms of least error for their MACs, and of those a few."""
    macs = np.array([site.macs(spec) for spec in grid.specs], float)
    hull = [i for i in lower_hull(macs, grid.errors) if macs[i] < site.macs(Conv())]
    places = np.linspace(0, len(hull) - 1, min(_TIMED_FORMS, len(hull)))
    kept = [hull[round(place)] for place in places]
    return RankGrid(tuple(grid.specs[i] for i in kept), grid.errors[kept])


def _latencies(
    budget: Budget,
    model: nn.Module,
    sites: Mapping[str, Site],
    grids: Mapping[str, RankGrid],
) -> Costs:
    """Returns each layer's time by form, in milliseconds."""
    dtype = getattr(model, "dtype", None) or jnp.float32
    measured: dict[Any, float] = {}
    costs: Costs = {}
    for path, site in sites.items():
        wanted = dict.fromkeys([Conv(), site.spec, *grids[path].specs])
        missing = [spec for spec in wanted if (site.geometry, spec) not in measured]
        times = site_latencies_ms(
            site, missing, batch_size=budget.batch_size, dtype=dtype
        )
        measured |= {(site.geometry, s): t for s, t in zip(missing, times, strict=True)}
        of = {spec: measured[site.geometry, spec] for spec in wanted}
        costs[path] = of.__getitem__
    return costs


def _measured_errors(
    model: nn.Module,
    variables: Mapping[str, Any],
    kernels: Mapping[str, WeighedKernel],
    grids: Mapping[str, RankGrid],
    batches: list[np.ndarray],
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Returns, of each layer, the outputs' divergence by the share of energy lost.

    One layer at a time is replaced by the dense kernel that its factors stand for, so
    that nothing compiles anew; between the probes the divergence is interpolated.
    """
    divergence = divergence_of(model, variables, batches)
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for path, of in kernels.items():
        macs = np.array([of.site.macs(spec) for spec in grids[path].specs], float)
        hull = lower_hull(macs, grids[path].errors)
        lost = [float(grids[path].errors[i]) for i in hull]
        # A layer that has no cheaper form has none to probe.
        near = [np.abs(np.array(lost) - p) for p in _PROBES if lost]
        probes = {int(np.argmin(distance)) for distance in near}
        points = [(0.0, 0.0)]
        for at in sorted(probes, key=lambda at: lost[at]):
            spec = grids[path].specs[hull[at]]
            # By HOSVD: which layers matter shows without HOOI's last improvement.
            kernel = of.dense_kernel(spec)
            leaves = {"kernel": jnp.asarray(kernel, of.site.kernel.dtype)}
            changed = with_leaves(
                variables, {path: {**leaves_at(variables, path), **leaves}}
            )
            # Noise must not make a larger error look like a smaller one.
            worst = max(points[-1][1], divergence(changed))
            points.append((lost[at], worst))
        x, y = np.array(points).T
        if x[-1] < 1:  # beyond the last probe, in proportion
            x, y = np.append(x, 1.0), np.append(y, y[-1] / max(x[-1], 1e-12))
        functions[path] = _interpolated(x, y)
    return functions


def _interpolated(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda lost: np.asarray(np.interp(lost, x, y))
