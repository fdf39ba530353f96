"""Chooses thresholds layer by layer, by the effect of closed tiles on the outputs."""

import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from inertia_jax.calls import NOTHING_CHANGES, ApplyFn
from inertia_jax.compression.calibration import (
    apply_as_trained,
    divergence,
    output_function,
    reference_outputs,
)
from inertia_jax.compression.ranks import ROUNDING
from inertia_jax.compression.sites import layer_places
from inertia_jax.compression.tile_costs import CostCurve, TileCosts
from inertia_jax.inputs import Inputs, batched
from inertia_jax.layers.inertial import FRICTION, GATE_RATE, mean_gate_rate
from inertia_jax.ops.inertial.settings import CLOSED, OPEN
from inertia_jax.plan.plan import Plan, as_glob
from inertia_jax.plan.specs import Inertial
from inertia_jax.progress import Progress, counted
from inertia_jax.variables import subtree

# The shares of open tiles that are tried for a layer, in this order.
_RATES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)
_BISECTIONS = 6


class Candidates(NamedTuple):
    """Layers that may have tiles: what they would be, by path, and their costs."""

    specs: dict[str, Inertial]
    costs: TileCosts


@dataclasses.dataclass(frozen=True)
class SearchState:
    """The layers' thresholds, and their effect on the calibration images.

    Attributes:
        thresholds: The thresholds, by path.
        rates: Measured shares of open tiles, by path.
        divergence: Mean Kullback-Leibler divergence from the dense network, in nats.
        frictions: The frictions of each layer's tiles, sorted, by path.
        cost: Cost of the whole network, in the units of `TileCosts`.
    """

    thresholds: dict[str, float]
    rates: dict[str, float]
    divergence: float
    frictions: dict[str, np.ndarray]
    cost: float


def with_thresholds(
    variables: Mapping[str, Any], thresholds: Mapping[tuple[str, ...], Any]
) -> dict[str, Any]:
    """Returns variables with other thresholds of the layers at some places."""
    flat = traverse_util.flatten_dict(variables.get("thresholds", {}))
    flat |= {(*place, "threshold"): value for place, value in thresholds.items()}
    return {**variables, "thresholds": traverse_util.unflatten_dict(flat)}


class ThresholdSearch:
    """A search for thresholds. They are variables, so one compiled call serves all."""

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        specs: dict[str, Inertial],
        costs: TileCosts,
        images: Inputs,
        batch_size: int,
        apply_fn: ApplyFn | None,
    ) -> None:
        """Runs the dense network once.

        Raises:
            ValueError: Outputs that are not finite, or not one array.
        """
        rules = tuple((as_glob(path), spec) for path, spec in specs.items())
        plan = Plan((*rules, *model.plan.rules)).without_ladders()
        self._model, self._apply_fn = model.clone(plan=plan), apply_fn
        self._variables = variables
        self._batches = [
            jax.tree.map(jnp.asarray, batch) for batch in batched(images, batch_size)
        ]
        outputs = output_function(model, apply_fn)
        self._dense = reference_outputs(outputs, variables, self._batches)
        self._apply = jax.jit(self._forward)
        self._paths = list(specs)
        self._places = layer_places(variables["params"])
        self._costs = costs

    def _forward(
        self, variables: Any, thresholds: dict[str, Any], batch: Any, dense: Any
    ) -> Any:
        places = {self._places[path]: t for path, t in thresholds.items()}
        logits, changed = apply_as_trained(
            self._model,
            with_thresholds(variables, places),
            batch,
            apply_fn=self._apply_fn,
        )
        sown = changed.get("intermediates", {})
        rates, frictions = {}, {}
        for path in self._paths:
            # A layer that is called twice sows twice.
            found = subtree(sown, path)
            if FRICTION not in found:
                raise ValueError(
                    f"{path!r} cannot say what its friction is: it may be called "
                    f"inside a transformation that passes nothing on, such as JAX's "
                    f"own `checkpoint`; use Flax's, or leave it out by `layers`. "
                    f"{NOTHING_CHANGES}"
                )
            calls = [f.reshape(len(f), -1) for f in found[FRICTION]]
            rates[path] = mean_gate_rate(found[GATE_RATE], calls)
            frictions[path] = jnp.concatenate(calls, 1)
        return divergence(dense, logits), rates, frictions

    def measure(self, thresholds: dict[str, float]) -> SearchState:
        """Runs the calibration images with these thresholds.

        Raises:
            ValueError: No call of the network can store what a layer measures.
        """
        arrays = {path: jnp.float32(t) for path, t in thresholds.items()}
        parts = [
            jax.device_get(self._apply(self._variables, arrays, batch, dense))
            for batch, dense in zip(self._batches, self._dense, strict=True)
        ]
        divergences, gate_rates, frictions = jax.tree.map(
            lambda *leaves: np.concatenate(leaves), *parts
        )
        # The mean over several calls of a layer is rounded.
        rates = {
            path: 1.0 if thresholds[path] == OPEN else float(gate_rates[path].mean())
            for path in self._paths
        }
        return SearchState(
            thresholds=thresholds,
            rates=rates,
            divergence=float(divergences.mean()),
            frictions={p: np.sort(f, axis=None) for p, f in frictions.items()},
            cost=self._costs.of(rates),
        )

    def with_rate(self, state: SearchState, path: str, rate: float) -> SearchState:
        """Returns the state with one layer's threshold set for a rate."""
        threshold = CLOSED
        if rate == 1:
            threshold = OPEN
        elif rate > 0:
            threshold = float(np.quantile(state.frictions[path], 1 - rate))
        return self.measure({**state.thresholds, path: threshold})

    def closed(self, path: str) -> SearchState:
        """Returns the state in which one layer has every tile closed, others none."""
        return self.measure(dict.fromkeys(self._paths, OPEN) | {path: CLOSED})

    def run(
        self,
        budget: float,
        progress: Progress | None = None,
        *,
        tighten: Callable[[SearchState, float], float] | None = None,
    ) -> SearchState:
        """Lowers rates until the network costs at most the budget.

        Args:
            budget: The cost of the whole network, in the units of `TileCosts`.
            progress: A function that is told how much of the search is done, as in
                `make_inertial`.
            tighten: A function of a state that keeps to the budget, and of the budget.
                It returns the budget that the state should have kept to.

        Raises:
            ValueError: A budget that no rates can meet.
        """
        state = self._all_open()
        levels = dict.fromkeys(self._paths, 0)
        # Scores grow stale as other layers change. So the best one is measured again
        # before it is taken, and is put back if another one has become better.
        queue = [(-np.inf, path) for path in self._paths]
        first = state.cost
        while state.cost > budget * (1 + ROUNDING):
            self._costs.check(budget)
            if progress is not None:
                untried = sum(score == -np.inf for score, _ in queue)
                if untried:
                    every = len(self._paths)
                    progress("trying to close tiles, layers", every - untried, every)
                else:
                    percent = int(100 * (first - state.cost) / (first - budget))
                    progress("choosing thresholds, percent", max(0, percent), 100)
            _, path = heapq.heappop(queue)
            trial = self.with_rate(state, path, _RATES[levels[path] + 1])
            while trial.cost >= state.cost and levels[path] + 2 < len(_RATES):
                levels[path] += 1  # friction costs more than this rate saves
                trial = self.with_rate(state, path, _RATES[levels[path] + 1])
            saved = max(state.cost - trial.cost, 1e-9)
            score = (trial.divergence - state.divergence) / saved
            if queue and score > queue[0][0]:
                heapq.heappush(queue, (score, path))
                continue
            if trial.cost <= budget:
                # The last move is made only as far as the budget asks.
                state = self._just_within(budget, state, trial, path, levels[path])
                heapq.heappush(queue, (score, path))
                if tighten is not None:
                    budget = tighten(state, budget)
                continue
            state = trial
            levels[path] += 1
            if levels[path] + 1 < len(_RATES):
                heapq.heappush(queue, (score, path))
        return state

    def _all_open(self) -> SearchState:
        return self.measure(dict.fromkeys(self._paths, OPEN))

    def _just_within(
        self, budget: float, state: SearchState, found: SearchState, path: str, at: int
    ) -> SearchState:
        """Returns a state between two, with the highest rate that keeps to a budget."""
        high, low = _RATES[at : at + 2]
        for _ in range(_BISECTIONS):
            middle = (high + low) / 2
            between = self.with_rate(state, path, middle)
            if between.cost <= budget:
                low, found = middle, between
            else:
                high = middle
        return found


def choose_tiles(
    every: Sequence[Candidates],
    search_of: Callable[[Candidates], ThresholdSearch],
    progress: Progress | None,
) -> Candidates:
    """Returns the layers that cost less with every tile closed, each with one size.

    Args:
        every: The layers with each size of tiles.
        search_of: A function that returns the search for such layers.
        progress: A function that is told how many sizes were tried.
    """
    paying = [
        {path: spec for path, spec in specs.items() if costs.curves[path].saves}
        for specs, costs in every
    ]
    if len(every) == 1:
        return every[0]._replace(specs=paying[0])
    found: dict[str, tuple[float, Inertial, CostCurve]] = {}
    pairs = list(zip(every, paying, strict=True))
    for (_, costs), specs in counted(pairs, progress, "trying sizes of tiles"):
        search = search_of(Candidates(specs, costs))
        for path, spec in specs.items():
            curve = costs.curves[path]
            score = search.closed(path).divergence / (curve.dense - curve.least)
            if path not in found or score < found[path][0]:
                found[path] = (score, spec, curve)
    specs = {path: spec for path, (_, spec, _) in found.items()}
    curves = {path: curve for path, (_, _, curve) in found.items()}
    return Candidates(specs, every[0].costs._replace(curves=curves))
