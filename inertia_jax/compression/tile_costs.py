"""The cost of a network by its shares of open tiles: MACs, or time measured here."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.calls import ApplyFn
from inertia_jax.compression.latency import (
    layer_forward,
    padding_of,
    random_inputs,
    time_interleaved,
)
from inertia_jax.compression.ranks import check_reachable
from inertia_jax.compression.sites import Site
from inertia_jax.cost.count import count_one
from inertia_jax.inputs import Shape
from inertia_jax.ops.inertial.settings import CLOSED
from inertia_jax.ops.inertial.tiled import inertial_conv_tiled
from inertia_jax.ops.inertial.window import InertialOutput
from inertia_jax.plan.plan import Plan, as_glob
from inertia_jax.plan.specs import Conv, Fixed, Inertial
from inertia_jax.progress import Progress, counted

# A share so small that it opens no tile; but friction is computed, unlike for 0.
GATED = float(np.finfo(np.float32).tiny)
# The shares of open tiles at which layers are timed. Between them, times are taken to
# be linear.
TIMED_RATES = (0.0, GATED, 0.05, 0.1, 0.25, 0.5, 0.9)


class CostCurve(NamedTuple):
    """The cost of a layer by its share of open tiles.

    Attributes:
        dense: The cost of the dense layer, which takes the place of open tiles alone.
        rates: Shares of open tiles, rising from 0.
        costs: The costs at these shares.
    """

    dense: float
    rates: tuple[float, ...]
    costs: tuple[float, ...]

    def at(self, rate: float) -> float:
        """Returns the cost at a share of open tiles."""
        if rate == 1:
            return self.dense
        return float(np.interp(rate, self.rates, self.costs))

    @property
    def least(self) -> float:
        """The cost with every tile closed, or that of the dense layer if it is less."""
        return min(self.dense, self.at(0.0))

    @property
    def saves(self) -> bool:
        """Whether the layer costs less than dense with every tile closed."""
        return self.least < self.dense


class TileCosts(NamedTuple):
    """The cost of a network whose layers may have tiles, and what it may cost.

    Attributes:
        name: The name of the cost: macs or latency.
        share: The share of the dense network's cost that may be taken.
        dense: The cost of the dense network.
        curves: The costs of the layers that may have tiles, by path.
    """

    name: str
    share: float
    dense: float
    curves: Mapping[str, CostCurve]

    def of(self, rates: Mapping[str, float]) -> float:
        """Returns the cost of the network at these shares of open tiles, by path."""
        curves = ((self.curves[path], rate) for path, rate in rates.items())
        return self.dense + sum(curve.at(rate) - curve.dense for curve, rate in curves)

    def check(self, budget: float) -> None:
        """Raises ValueError where no share of open tiles keeps to a budget.

        The budget stands for `share`: it may be lower than this share of `dense`, where
        networks have turned out to cost more than the sum of their layers.
        """
        saved = sum(curve.dense - curve.least for curve in self.curves.values())
        least = (self.dense - saved) / budget * self.share
        state = "every tile closed"
        check_reachable(self.name, self.share, least, state=state, forms="tiles")


def macs_of_tiles(
    share: float,
    model: nn.Module,
    specs: Mapping[str, Inertial],
    shape: Shape,
    apply_fn: ApplyFn | None,
) -> TileCosts:
    """Returns the MACs of an image, where two operations of friction count as one.

    Args:
        share: The share of the dense network's MACs that may be taken.
        model: The dense network, which has a plan.
        specs: The layers that may have tiles, by path.
        shape: The shape of one input.
        apply_fn: How the network is called, as in `compress`.
    """
    count = functools.partial(count_one, apply_fn=apply_fn)

    def tiled(threshold: Fixed) -> nn.Module:
        rules = tuple(
            (as_glob(path), replace(spec, threshold=threshold))
            for path, spec in specs.items()
        )
        return model.clone(plan=Plan((*rules, *model.plan.rules)))

    dense, gated = count(model, shape), tiled(Fixed.OPEN)
    # From this share on, types that spare no output compute all of them.
    bends = {path: 1 - 1 / _tile_size(spec) ** 2 for path, spec in specs.items()}
    tables = [
        dense,
        count(tiled(Fixed.CLOSED), shape),
        count(gated, shape, gate_rates=dict.fromkeys(specs, 0.0)),
        count(gated, shape, gate_rates=bends),
        count(gated, shape),
    ]
    curves = {}
    for rows in zip(*(table.rows for table in tables), strict=True):
        path = rows[0].path
        if path in specs:
            every, *costs = (row.macs + row.other_ops / 2 for row in rows)
            rates = (0.0, GATED, bends[path], 1.0)
            curves[path] = CostCurve(every, rates, tuple(costs))
    return TileCosts("macs", share, float(dense.macs), curves)


def _tile_size(spec: Inertial) -> int:
    return spec.region_size - spec.core_size + 1


def times_of_tiles(
    share: float,
    dense_ms: float,
    sites: Mapping[str, Site],
    specs: Mapping[str, Inertial],
    *,
    batch_size: int,
    dtype: Any,
    progress: Progress | None,
) -> TileCosts:
    """Returns the milliseconds of a call, measured here, each layer by itself.

    Args:
        share: The share of the dense network's time that may be taken.
        dense_ms: The time of the dense network.
        sites: The network's convolutions, by path.
        specs: The layers that may have tiles, by path.
        batch_size: Images per call.
        dtype: The type of images and weights.
        progress: A function that is told how many layers are done.
    """
    measured: dict[Any, CostCurve] = {}
    curves = {}
    for path, spec in counted(specs.items(), progress, "timing layers"):
        site = sites[path]
        # Layers of one geometry are measured once.
        key = (site.geometry, spec)
        if key not in measured:
            measured[key] = layer_times(site, spec, batch_size=batch_size, dtype=dtype)
        curves[path] = measured[key]
    # Timed one by one, layers may take longer than the network; a share is of both.
    layers = sum(curve.dense for curve in curves.values())
    return TileCosts("latency", share, max(dense_ms, layers), curves)


def layer_times(
    site: Site, spec: Inertial, *, batch_size: int, dtype: Any
) -> CostCurve:
    """Returns the milliseconds that a layer takes, dense and in tiles.

    Images and weights are random, so that open tiles lie anywhere.

    Args:
        site: The convolution, whose shapes are used.
        spec: Its tiles.
        batch_size: Images per call.
        dtype: The type of images and weights.
    """
    kernel = jax.random.normal(jax.random.key(0), site.kernel.shape, dtype)
    dense = jax.jit(functools.partial(layer_forward, site, Conv()))
    tiled = jax.jit(lambda *arrays: _tiled(site, spec, *arrays).y)
    measure = jax.jit(lambda *arrays: _tiled(site, spec, *arrays).friction)
    times = []
    for x in random_inputs(site, batch_size, dtype):
        friction = np.asarray(measure(x, kernel, jnp.float32(CLOSED)), np.float32)
        calls = [functools.partial(dense, x, [kernel])]
        for rate in TIMED_RATES:
            threshold = np.quantile(friction, 1 - rate) if rate else CLOSED
            calls.append(functools.partial(tiled, x, kernel, jnp.float32(threshold)))
        times.append(time_interleaved(calls))
    # The time of a layer that is called several times is that of all its calls.
    dense_ms, *tiled_ms = map(sum, zip(*times, strict=True))
    return CostCurve(dense_ms, TIMED_RATES, tuple(tiled_ms))


def _tiled(
    site: Site, spec: Inertial, x: jax.Array, kernel: jax.Array, threshold: Any
) -> InertialOutput:
    return inertial_conv_tiled(
        x,
        kernel,
        region_size=spec.region_size,
        threshold=threshold,
        metric=spec.metric,
        reference=spec.reference,
        low=spec.low,
        padding=padding_of(site),
        capacities=spec.capacities,
        channel_stride=spec.channel_stride,
    )
