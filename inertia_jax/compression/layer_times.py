"""The times of a network's layers, each in a few forms, as a budget weighs them."""

import functools
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.calls import ApplyFn, Network
from inertia_jax.compression.allocation import Forms, lower_hull
from inertia_jax.compression.chip_times import chip_times
from inertia_jax.compression.latency import site_latencies_ms
from inertia_jax.compression.ranks import Budget
from inertia_jax.compression.sites import Site
from inertia_jax.compression.whole_network import network_in
from inertia_jax.inputs import Shape
from inertia_jax.layers.kinds import ranks_of
from inertia_jax.plan.specs import Conv
from inertia_jax.progress import Progress, counted

# The most forms of a layer whose latency is measured.
_TIMED_FORMS = 8
# The ranks in the networks that are compiled for a chip, as shares of the most: a pair
# a network, which takes a minute.
_COMPILED_SHARES = (
    *((share, share) for share in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)),
    (1 / 4, 1 / 2),
    (1 / 2, 1 / 4),
)
# The milliseconds that each layer takes, by path and form.
LayerTimes = dict[str, dict[Any, float]]


def measured_times(
    budget: Budget,
    model: nn.Module,
    sites: Mapping[str, Site],
    grids: Sequence[Mapping[str, Forms]],
    progress: Progress | None,
) -> LayerTimes:
    """Returns the times of layers by themselves, in a few forms, measured here.

    Args:
        budget: The budget, which has the number of images.
        model: The dense network, which has the type of images and weights.
        sites: The convolutions that may change, by path.
        grids: Their forms, with errors of each kind. Forms on the hulls are measured.
        progress: A function that is told how many layers are done.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32
    measured: dict[Any, dict[Any, float]] = {}
    for path, site in counted(sites.items(), progress, "timing layers"):
        # Layers of one geometry are measured once.
        times = measured.setdefault(site.geometry, {})
        wanted = dict.fromkeys([Conv(), site.spec])
        for grid in (each[path] for each in grids):
            hull = [
                i
                for i in lower_hull(grid.costs, grid.errors)
                if grid.costs[i] < site.macs(Conv())
            ]
            steps = np.linspace(0, len(hull) - 1, min(_TIMED_FORMS, len(hull)))
            wanted |= {grid.specs[hull[round(step)]]: None for step in steps}
        new = [spec for spec in wanted if spec not in times]
        found = site_latencies_ms(site, new, batch_size=budget.batch_size, dtype=dtype)
        times.update(zip(new, found, strict=True))
    return {path: measured[site.geometry] for path, site in sites.items()}


def estimated_times(
    budget: Budget,
    networks: tuple[Network, Network],
    sites: Mapping[str, Site],
    grids: Mapping[str, Forms],
    image_shape: Shape,
    apply_fn: ApplyFn | None,
    progress: Progress | None,
) -> LayerTimes:
    """Returns the times of layers within their network, as a chip's compiler estimates.

    All layers change together from one network to the next, so that few are compiled.
    The time of a form is the mean over the networks in which the layer has it. Warns of
    the layers that no form makes faster.

    Args:
        budget: The budget, which has the chip and the number of images.
        networks: The dense network, and the network as it is.
        sites: The convolutions that may change, by path.
        grids: Their forms.
        image_shape: The shape of one input.
        apply_fn: How the networks are called, as in `compress`.
        progress: A function that is told how many networks are compiled.
    """
    device = budget.device or ""
    times_of = functools.partial(
        chip_times,
        image_shape=image_shape,
        device=device,
        batch_size=budget.batch_size,
        apply_fn=apply_fn,
    )
    dense, now = networks
    places = {path: _to_compile(site, grids[path]) for path, site in sites.items()}
    every: dict[Any, Network] = {}
    for step in zip(*places.values(), strict=True):
        specs = {
            path: sites[path].spec if place is None else grids[path].specs[place]
            for path, place in zip(sites, step, strict=True)
        }
        every[tuple(specs.items())] = network_in(now, sites, specs)
    found: dict[str, dict[Any, list[float]]] = {path: {} for path in sites}
    for specs, network in counted(every.items(), progress, "compiling networks"):
        layers = times_of(network).layers
        for path, spec in specs:
            found[path].setdefault(spec, []).append(layers.get(path, 0.0))
    before, present = times_of(dense).layers, times_of(now).layers
    times: LayerTimes = {}
    slower = []
    for path, site in sites.items():
        forms = {spec: statistics.mean(each) for spec, each in found[path].items()}
        # The present form is as in the present network, whatever the mean is.
        ms = present.get(path, 0.0)
        forms.pop(site.spec, None)
        if ms <= min(forms.values(), default=math.inf):
            slower.append(path)
        times[path] = {Conv(): before.get(path, 0.0), **forms, site.spec: ms}
    if slower:
        warnings.warn(
            f"these layers stay as they are, since no form of them is faster on "
            f"{device}, as its compiler estimates: {', '.join(slower)}.",
            stacklevel=5,
        )
    return times


def _to_compile(site: Site, grid: Forms) -> list[int | None]:
    """Returns the place of a layer's form in each network that is compiled.

    It is None where the form would not take fewer MACs than the dense layer.
    """
    ranks = np.array([ranks_of(spec) for spec in grid.specs])
    places: list[int | None] = []
    for pair in _COMPILED_SHARES:
        shares = np.array(pair if ranks.shape[1] == 2 else [min(pair)])
        wanted = shares * ranks.max(axis=0)
        place = int(np.abs(ranks - wanted).sum(axis=1).argmin())
        places.append(place if grid.costs[place] < site.macs(Conv()) else None)
    return places
