"""Chooses all ranks of a network jointly, for the least error within a budget."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

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
from inertia_jax.compression.latency import model_latency_ms, site_latencies_ms
from inertia_jax.compression.ranks import Budget
from inertia_jax.compression.sites import Factorised, Site, leaves_at, with_leaves
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.cost.count import count_one
from inertia_jax.inputs import Shape
from inertia_jax.plan.specs import Conv
from inertia_jax.progress import Progress, counted

# The lost shares of energy at which a layer's effect on the outputs is measured.
_PROBES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6)
# The most forms of a layer whose latency is measured.
_TIMED_FORMS = 8

Costs = dict[str, Callable[[Conv | Factorised], float]]


def choose_ranks(
    budget: Budget,
    now: Network,
    dense: Network,
    kernels: Mapping[str, WeighedKernel],
    batches: list[Any],
    *,
    image_shape: Shape,
    round_to: int,
    apply_fn: ApplyFn | None,
    progress: Progress | None,
) -> dict[str, Conv | Factorised]:
    """Returns the form of every convolution.

    Args:
        budget: The share of the dense network's cost that may be taken.
        now: The network as it is.
        dense: The network with its factors multiplied out.
        kernels: The convolutions that may change, by path.
        batches: Batches of the network's inputs; without any, the relative errors of
            the kernels are summed.
        image_shape: The shape of one input.
        round_to: The number that ranks become multiples of.
        apply_fn: How the network is called, as in `compress`.
        progress: A function that is told how many layers are done, as in `compress`.

    Raises:
        ValueError: A budget that no ranks can meet; says the least possible.
    """
    sites = {path: kernel.site for path, kernel in kernels.items()}
    grids = {
        path: make_grid(kernel.site, kernel.kernel, round_to=round_to)
        for path, kernel in kernels.items()
    }
    if budget.of == "latency":
        grids = {path: _thinned(sites[path], grid) for path, grid in grids.items()}
        costs = _latencies(budget, dense[0], sites, grids, progress)
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
    least = fixed + sum(
        min(map(cost_of, (sites[path].spec, *grids[path].specs)))
        for path, cost_of in costs.items()
    )
    if least > budget.share * total * (1 + 1e-12):
        # The share is rounded up, because the share that is named must be reachable.
        share = math.ceil(1e4 * least / total) / 1e4
        raise ValueError(
            f"`{budget.of}` (={budget.share}) must be at least {share:.4f}, the share "
            f"with every rank the least possible."
        )
    errors = {path: lambda lost: lost for path in sites}
    if batches:
        errors = _measured_errors(dense, kernels, grids, batches, apply_fn, progress)
    forms = {
        path: all_forms(site, grids[path], cost_of=costs[path], error_of=errors[path])
        for path, site in sites.items()
    }
    choices = {path: make_choices(every) for path, every in forms.items()}
    specs = allocate(choices, fixed=fixed, budget=budget.share * total)
    taken = sum(cost_of(specs[path]) for path, cost_of in costs.items())
    return spend_rest(specs, forms, budget.share * total - fixed - taken)


def _cost(
    budget: Budget,
    network: Network,
    image_shape: Shape,
    apply_fn: ApplyFn | None,
) -> float:
    """Returns the cost of a whole network, in the units of the budget."""
    if budget.of == "latency":
        return model_latency_ms(
            *network, image_shape, batch_size=budget.batch_size, apply_fn=apply_fn
        )
    table = count_one(network[0], image_shape, apply_fn=apply_fn)
    return float(table.macs if budget.of == "macs" else table.params)


def _thinned(site: Site, grid: Forms) -> Forms:
    """Returns a few forms on the hull that take fewer MACs than the dense one."""
    hull = grid.hull()
    hull = hull.take(np.flatnonzero(hull.costs < site.macs(Conv())).tolist())
    count = len(hull.specs)
    places = np.linspace(0, count - 1, min(_TIMED_FORMS, count))
    return hull.take(round(place) for place in places)


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
    for path, site in counted(sites.items(), progress, "timing layers"):
        # Layers of one geometry are measured once.
        times = measured.setdefault(site.geometry, {})
        wanted = dict.fromkeys([Conv(), site.spec, *grids[path].specs])
        new = [spec for spec in wanted if spec not in times]
        found = site_latencies_ms(site, new, batch_size=budget.batch_size, dtype=dtype)
        times.update(zip(new, found, strict=True))
        costs[path] = times.__getitem__
    return costs


def _measured_errors(
    dense: Network,
    kernels: Mapping[str, WeighedKernel],
    grids: Mapping[str, Forms],
    batches: list[Any],
    apply_fn: ApplyFn | None,
    progress: Progress | None,
) -> dict[str, Callable[[np.ndarray], Any]]:
    """Returns, for each layer, the outputs' divergence by the share of energy lost.

    One layer at a time gets the dense kernel that its factors stand for, so that
    nothing compiles anew. Between the probes the divergence is interpolated.
    """
    divergence = divergence_of(*dense, batches, apply_fn)
    functions: dict[str, Callable[[np.ndarray], Any]] = {}
    for path, layer in counted(kernels.items(), progress, "trying ranks of layers"):
        specs, _, lost = grids[path].hull()
        # A layer without a cheaper form has nothing to probe.
        probes = {int(np.argmin(np.abs(lost - p))) for p in _PROBES if specs}
        points = [(0.0, 0.0)]
        for i in sorted(probes, key=lambda i: lost[i]):
            spec: Any = specs[i]  # a grid has no dense form
            # HOSVD is enough: HOOI changes little in which layers matter.
            kernel = jnp.asarray(layer.dense_kernel(spec), layer.site.kernel.dtype)
            leaves = {**leaves_at(dense[1], path), "kernel": kernel}
            changed = with_leaves(dense[1], {path: leaves})
            # Noise must not make a larger loss look better than a smaller one.
            worst = max(points[-1][1], divergence(changed))
            points.append((float(lost[i]), worst))
        x, y = np.array(points).T
        if x[-1] < 1:  # beyond the last probe the divergence grows in proportion
            x, y = np.append(x, 1.0), np.append(y, y[-1] / max(x[-1], 1e-12))
        functions[path] = functools.partial(np.interp, xp=x, fp=y)
    return functions
