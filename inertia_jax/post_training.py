"""Post-training inertia: a trained network made inertial, without training it again."""

import dataclasses
import fnmatch
import heapq
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.calibration import checked_images
from inertia_jax.cost import CostTable, count_cost
from inertia_jax.ops.friction import Metric, Reference
from inertia_jax.ops.tiling import Low
from inertia_jax.plan import Fixed, Inertial, Plan, Rate
from inertia_jax.recalibrate import recalibrate_batch_norm

# Shares of open tiles that a layer is tried at, one after the other.
_RATES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)
_BISECTIONS = 6
# Below every friction, and above: all tiles open, all closed.
_OPEN, _CLOSED = -1.0, 1e30


def make_inertial(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    macs: float,
    calibration: Float[ArrayLike, "n h w c"],
    recalibration: Float[ArrayLike, "n_recalibration h w c"] | None = None,
    layers: str = "*",
    tile_size: int = 2,
    metric: Metric = "l1",
    reference: Reference = "center",
    low: Low = "mean",
    channel_stride: int = 1,
    batch_size: int = 256,
) -> tuple[nn.Module, dict[str, Any]]:
    """Makes a trained network's convolutions inertial, in the tiled reading.

    With every tile open the network is the one it was. From there the thresholds are
    chosen greedily: of all layers, the one is taken further whose next lower rate of
    open tiles moves the outputs least for the MACs it saves, moved outputs being the
    mean Kullback-Leibler divergence from the softmax of the network as it was. Labels
    are not needed. A layer of rate 1 stays an ordinary convolution.

    Filled tiles vary less, which BatchNorm's old statistics take for a change of scale:
    most of the damage. So thresholds are chosen under the statistics of the images at
    hand, and the statistics are recalibrated in the end (`recalibrate_batch_norm`).

    Returns thresholds as variables, which evaluation uses as they are; the plan has
    each layer's rate as `Rate`, so that fine-tuning holds it.

    Args:
        model: A network of this library.
        variables: Its trained variables.
        macs: Share of the network's MACs to take, in (0, 1], on the calibration
            images: `CostTable.total_macs`, so friction and box means at two operations
            for one MAC. A compiled ladder rounds open tiles up, see `ladder_macs`.
        calibration: Some hundred of the network's inputs, normalised, as evaluation
            will see them: they choose the thresholds.
        recalibration: Some thousand inputs as training saw them, with its crops and
            flips, for BatchNorm: plain images alone cost a CIFAR-10 ResNet20 four
            points, even left dense. None takes `calibration`.
        layers: Glob over the paths of the convolutions that may become inertial.
        tile_size: Side n of a tile, >= 2.
        metric: See `Inertial`.
        reference: See `Inertial`.
        low: See `Inertial`.
        channel_stride: See `Inertial`.
        batch_size: Images a call; what fills no whole batch is left out.

    Returns:
        (model, variables) of the inertial network.

    Raises:
        ValueError: A share that no rates can meet (says the least possible), a glob
            that matches no convolution that can be tiled, a network that is inertial
            already, or outputs that are not finite.
    """
    if not 0 < macs <= 1:
        raise ValueError(f"`macs` (={macs}) must be in (0, 1].")
    if tile_size < 2:
        raise ValueError(f"`tile_size` (={tile_size}) must be >= 2.")
    plan = getattr(model, "plan", None)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"`model` (={type(model).__name__}) must be one that create_model makes."
        )
    if any(isinstance(spec, Inertial) for _, spec in plan.rules):
        raise ValueError(f"`model` has inertial layers already: {plan}.")
    images = checked_images(calibration)
    options: dict[str, Any] = {
        "reading": "tiled",
        "metric": metric,
        "reference": reference,
        "low": low,
        "channel_stride": channel_stride,
    }
    specs = _tileable(model, variables, images.shape[1:], layers, tile_size, options)
    search = _Search(model, variables, specs, images, batch_size)
    state = search.run(macs)

    rules: list[tuple[str, Inertial]] = []
    thresholds: dict[tuple[str, ...], Any] = {}
    wide = jnp.promote_types(model.dtype, jnp.float32)
    for path, spec in specs.items():
        rate, threshold = state.rates[path], state.thresholds[path]
        if rate == 1:
            continue
        target = Rate(rate) if rate else Fixed(_CLOSED)
        rules.append((path, dataclasses.replace(spec, threshold=target)))
        thresholds[(*path.split("/"), "threshold")] = jnp.asarray(threshold, wide)
    if not rules:
        return model, dict(variables)
    inertial = model.clone(plan=Plan((*rules, *plan.rules)))
    changed = {**variables, "thresholds": traverse_util.unflatten_dict(thresholds)}
    if "batch_stats" in variables:
        # The measured thresholds, not the quantiles of each batch of the recalibration.
        fixed = tuple((path, specs[path]) for path, _ in rules)
        seen = images if recalibration is None else recalibration
        stats = recalibrate_batch_norm(
            model.clone(plan=Plan((*fixed, *plan.rules))),
            changed,
            seen,
            batch_size=batch_size,
        )["batch_stats"]
        changed["batch_stats"] = stats
    return inertial, changed


def _tileable(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, ...],
    layers: str,
    tile_size: int,
    options: dict[str, Any],
) -> dict[str, Inertial]:
    """Returns what each convolution becomes that `layers` matches and tiles fit."""
    specs: dict[str, Inertial] = {}
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    for row in count_cost(model, image_shape).rows:
        if row.kind != "conv" or not fnmatch.fnmatchcase(row.path, layers):
            continue
        side = params[f"{row.path}/kernel"].shape[0]
        # Of a 1x1 convolution, friction costs about as much as tiles can save.
        if side > 1:
            region = side + tile_size - 1
            specs[row.path] = Inertial(side, region, threshold=Fixed(_OPEN), **options)
    tried = model.clone(plan=Plan((*specs.items(), *model.plan.rules)))
    rows = count_cost(tried, image_shape).rows
    inertial = {row.path for row in rows if row.kind == "inertial"}
    if not inertial:
        raise ValueError(
            f"`layers` (={layers!r}) matches no convolution of stride 1 with filters "
            f"larger than 1 x 1."
        )
    return {path: spec for path, spec in specs.items() if path in inertial}


@dataclasses.dataclass(frozen=True)
class _State:
    """Thresholds, and what they do to the calibration images.

    Attributes:
        thresholds: By path.
        rates: Measured shares of open tiles, by path.
        divergence: Mean Kullback-Leibler divergence from the dense network, in nats.
        frictions: Of each layer's tiles, sorted.
        cost: Everything counted, in MACs an image.
    """

    thresholds: dict[str, float]
    rates: dict[str, float]
    divergence: float
    frictions: dict[str, np.ndarray]
    cost: float


class _Search:
    """Tries thresholds, which are variables, so that one compiled call serves all."""

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        specs: dict[str, Inertial],
        images: np.ndarray,
        batch_size: int,
    ) -> None:
        rules = Plan((*specs.items(), *model.plan.rules)).without_ladders().rules
        self._model = model.clone(plan=Plan(rules))
        self._variables = variables
        self._batches = [
            jnp.asarray(images[i : i + batch_size])
            for i in range(0, max(1, len(images) - batch_size + 1), batch_size)
        ]
        dense = jax.jit(lambda v, batch: self._logits(model, v, batch)[0])
        self._dense = [dense(variables, batch) for batch in self._batches]
        if not all(bool(jnp.isfinite(logits).all()) for logits in self._dense):
            raise ValueError(
                "the outputs on `calibration` must be finite; some are not."
            )
        shape = images.shape[1:]
        self._dense_cost = count_cost(model, shape)
        closed = count_cost(self._model, shape, gate_rates=dict.fromkeys(specs, 0.0))
        opened = count_cost(self._model, shape)
        self._costs = _layer_costs(self._dense_cost, closed, opened, specs)
        self._apply = jax.jit(self._forward)
        self._paths = list(specs)

    @staticmethod
    def _logits(model: nn.Module, variables: Mapping[str, Any], batch: Any) -> Any:
        """Returns logits under the batch's own statistics, and what was sown."""
        has_statistics = "batch_stats" in variables
        return model.apply(
            variables,
            batch,
            train=has_statistics,
            mutable=["intermediates", "batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )

    def _forward(
        self, variables: Any, thresholds: dict[str, Any], batch: Any, dense: Any
    ) -> Any:
        nested = traverse_util.unflatten_dict(
            {(*path.split("/"), "threshold"): t for path, t in thresholds.items()}
        )
        logits, sown = self._logits(
            self._model, {**variables, "thresholds": nested}, batch
        )
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        p = jax.nn.log_softmax(dense.astype(wide))
        q = jax.nn.log_softmax(logits.astype(wide))
        divergence = (jnp.exp(p) * (p - q)).sum(-1)
        flat = traverse_util.flatten_dict(sown.get("intermediates", {}))
        named: dict[str, dict[str, Any]] = {"gate_rate": {}, "friction": {}}
        for (*path, name), value in flat.items():
            named[name]["/".join(path)] = value[0]
        return divergence, named["gate_rate"], named["friction"]

    def measure(self, thresholds: dict[str, float]) -> _State:
        """Runs the calibration images with these thresholds."""
        arrays = {path: jnp.float32(t) for path, t in thresholds.items()}
        parts = [
            jax.device_get(self._apply(self._variables, arrays, batch, dense))
            for batch, dense in zip(self._batches, self._dense, strict=True)
        ]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        divergence, gate_rates, frictions = joined
        rates = {path: float(gate_rates[path].mean()) for path in self._paths}
        return _State(
            thresholds=thresholds,
            rates=rates,
            divergence=float(divergence.mean()),
            frictions={p: np.sort(f, axis=None) for p, f in frictions.items()},
            cost=self.cost(rates),
        )

    def cost(self, rates: dict[str, float]) -> float:
        """Returns the MACs of the whole network at these rates."""
        total = float(self._dense_cost.macs)
        for path, rate in rates.items():
            dense, closed, opened = self._costs[path]
            if rate < 1:
                total += closed + rate * (opened - closed) - dense
        return total

    def with_rate(self, state: _State, path: str, rate: float) -> _State:
        """Returns the state after one layer's threshold was set for a rate."""
        threshold = _CLOSED
        if rate == 1:
            threshold = _OPEN
        elif rate > 0:
            threshold = float(np.quantile(state.frictions[path], 1 - rate))
        return self.measure({**state.thresholds, path: threshold})

    def run(self, macs: float) -> _State:
        """Lowers rates until the network takes at most the share `macs`."""
        budget = macs * self._dense_cost.macs
        state = self.measure(dict.fromkeys(self._paths, _OPEN))
        if state.cost <= budget:
            return state
        least = self.cost(dict.fromkeys(self._paths, 0.0))
        if least > budget:
            share = least / self._dense_cost.macs
            raise ValueError(
                f"`macs` (={macs}) must be at least {share:.4f}, the share with every "
                f"tile closed."
            )
        levels = dict.fromkeys(self._paths, 0)
        # Scores grow stale as other layers change; the best is measured again before it
        # is taken, and put back if another one has become better.
        queue = [(-np.inf, path) for path in self._paths]
        while True:
            _, path = heapq.heappop(queue)
            tried = self.with_rate(state, path, _RATES[levels[path] + 1])
            while tried.cost >= state.cost and levels[path] + 2 < len(_RATES):
                levels[path] += 1  # friction takes what this rate saves
                tried = self.with_rate(state, path, _RATES[levels[path] + 1])
            saved = max(state.cost - tried.cost, 1e-9)
            score = (tried.divergence - state.divergence) / saved
            if queue and score > queue[0][0]:
                heapq.heappush(queue, (score, path))
                continue
            if tried.cost <= budget:
                return self._up_to(state, tried, path, levels[path], budget)
            state = tried
            levels[path] += 1
            if levels[path] + 1 < len(_RATES):
                heapq.heappush(queue, (score, path))

    def _up_to(
        self, state: _State, tried: _State, path: str, level: int, budget: float
    ) -> _State:
        """Returns the last move, made only as far as the budget asks."""
        high, low = _RATES[level], _RATES[level + 1]
        for _ in range(_BISECTIONS):
            middle = (high + low) / 2
            between = self.with_rate(state, path, middle)
            if between.cost <= budget:
                low, tried = middle, between
            else:
                high = middle
        return tried


def _layer_costs(
    dense: CostTable, closed: CostTable, opened: CostTable, specs: dict[str, Inertial]
) -> dict[str, tuple[float, float, float]]:
    """Returns each layer's MACs dense, with every tile closed, and with every open."""
    rows = {row.path: row for row in dense.rows}
    ends = zip(closed.rows, opened.rows, strict=True)
    return {
        low.path: (
            rows[low.path].macs,
            low.macs + low.other_ops / 2,
            high.macs + high.other_ops / 2,
        )
        for low, high in ends
        if low.path in specs
    }
