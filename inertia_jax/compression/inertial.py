"""Post-training inertia: makes a trained network inertial without further training."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Shaped

from inertia_jax.calls import ApplyFn, takes_train
from inertia_jax.compression.latency import network_latencies_ms
from inertia_jax.compression.planned import Planned
from inertia_jax.compression.recalibrate import (
    recalibrate_batch_norm,
    running_statistics,
)
from inertia_jax.compression.sites import (
    Site,
    layer_places,
    leaves_at,
    reasons,
    split_convolutions,
)
from inertia_jax.compression.thresholds import (
    Candidates,
    SearchState,
    ThresholdSearch,
    choose_tiles,
    with_thresholds,
)
from inertia_jax.compression.tile_costs import macs_of_tiles, times_of_tiles
from inertia_jax.dropped import dropped_rules
from inertia_jax.inputs import Inputs, Shape, batched, num_inputs
from inertia_jax.models.create import inputs_of, shape_of_inputs
from inertia_jax.ops.inertial.settings import CLOSED, OPEN, Low, Metric, Reference
from inertia_jax.plan.plan import Plan, as_glob, matches, plan_of
from inertia_jax.plan.specs import Conv, Fixed, Inertial, Rate, as_python, core_of
from inertia_jax.progress import Progress
from inertia_jax.variables import plain_variables

# A network that is slower than its layers promised is made faster by this share at
# least, so that few networks are compiled.
_LEAST_STEP = 0.99


def make_inertial(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    macs: float | None = None,
    latency: float | None = None,
    calibration: Shaped[ArrayLike, "n *image"] | Mapping[str, Any],
    recalibration: Shaped[ArrayLike, "n_recalibration *image"]
    | Mapping[str, Any]
    | None = None,
    layers: str = "*",
    tile_size: int | Sequence[int] = 2,
    metric: Metric = "l1",
    reference: Reference = "center",
    low: Low = "mean",
    channel_stride: int = 1,
    batch_size: int = 256,
    latency_batch: int = 64,
    apply_fn: ApplyFn | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Makes a trained network's convolutions inertial, in the tiled reading.

    With every tile open the network computes what it did before. From there the
    thresholds are chosen greedily: every step lowers the rate of open tiles in the
    layer where that moves the outputs least for the MACs, or the time, it saves. The
    distance that outputs move is the mean Kullback-Leibler divergence from the softmax
    of the original network. Labels are not needed. A layer of rate 1 stays an ordinary
    convolution, and so does one that takes no less with every tile closed.

    Fewer MACs are less time only in some layers (docs/inertia_map.md). `latency` counts
    the time here instead: of each layer by itself, and in the end of the whole network.
    What is saved is for CPUs: on a TPU no form of a tiled layer is as quick as its
    dense convolution, by the compiler's estimate (docs/accelerators.md).

    Filled tiles vary less than computed ones. Under BatchNorm's old statistics this is
    a change of scale, and most of the damage. So thresholds are chosen under the
    statistics of the calibration images, and the statistics are recalibrated at the end
    (`recalibrate_batch_norm`).

    Thresholds become variables, which evaluation uses as they are. The plan has each
    layer's rate as `Rate`, so that fine-tuning holds it: a training step takes the
    quantile of its batch, and moves the threshold towards it, in the collection
    `thresholds`, which must be mutable. (With `model.clone(plan=
    model.plan.with_fixed_thresholds())` training moves no threshold.)

    Convolutions of other models than this library's can be inertial where `Planned`
    says, and where their kernels are those stored; `Planned.kept` says which cannot. A
    network that cannot be told that it is trained keeps its statistics.

    Args:
        model: A network of this library, or any Linen model made of `nn.Conv`, which
            comes back as `Planned`.
        variables: Its trained variables.
        macs: The share of the network's MACs to take on the calibration images, in
            (0, 1]. They are `CostTable.total_macs`, which counts two operations of
            friction and box means as one MAC. A compiled ladder rounds the number of
            open tiles up, see `ladder_macs`. None: `latency` is given.
        latency: The share of the network's time to take, in (0, 1], measured here on
            the calibration images, with BatchNorm not folded. None: `macs` is given.
        calibration: Some hundred of the network's inputs, normalised as for evaluation:
            an array, or a dictionary of arrays, as in `compress`. The thresholds are
            chosen on them.
        recalibration: Some thousand inputs for BatchNorm, with the crops and flips of
            the training. Recalibration on plain images alone costs a CIFAR-10 ResNet20
            four points, even a dense one. None: the images of `calibration`.
        layers: A glob over the paths of the convolutions that may become inertial.
        tile_size: Side n of a tile, >= 2; or several, of which each layer takes the one
            that moves the outputs least for what it saves with every tile closed.
        metric: The measure of friction, as in `Inertial`.
        reference: The value that friction is measured against, as in `Inertial`.
        low: The filling of a closed tile, as in `Inertial`.
        channel_stride: The step between channels that friction reads, as in `Inertial`.
        batch_size: Images per call; images that fill no whole batch are left out.
        latency_batch: Images per call where latency is measured, >= 1; all of
            `calibration` if these are fewer.
        apply_fn: How the network is called, as in `compress`.
        progress: A function that is told how much of the search is done, as in
            `compress`: layers that were timed or tried, then percent of what to save.

    Returns:
        (model, variables) of the inertial network.

    Raises:
        ValueError: A share that no rates can meet (the message says the least
            possible), a glob that matches no convolution that can be tiled, a network
            that is inertial already, or outputs that are not finite.

    Example:
        >>> gated, thresholds = ij.make_inertial(
        ...     model, variables, macs=0.9, calibration=images
        ... )
        >>> sorted(thresholds)
        ['params', 'thresholds']
    """
    given = as_python(tile_size)
    sizes = tuple(map(as_python, given)) if np.ndim(given) else (given,)
    _check_options(macs, latency, sizes, batch_size, latency_batch)
    share = as_python(latency if macs is None else macs)
    original, model = model, _with_plan(model)
    variables = plain_variables(variables)
    images = inputs_of(model, calibration)
    shape = shape_of_inputs(model, images)
    settings = {
        "reading": "tiled",
        "metric": metric,
        "reference": reference,
        "low": low,
        "channel_stride": channel_stride,
    }
    sites, kept = split_convolutions(model, variables, shape, apply_fn)
    timed = batched(images, latency_batch)[0]
    measure_ms = functools.partial(
        network_latencies_ms,
        image_shape=shape,
        batch_size=latency_batch,
        apply_fn=apply_fn,
        images=timed,
    )

    tileable = [
        _tileable(model, sites, kept, shape, layers, size, settings, apply_fn)
        for size in sizes
    ]
    dense_ms = 0.0 if latency is None else measure_ms([(model, variables)])[0]
    dtype = getattr(original, "dtype", None)
    found = []
    for specs in tileable:
        if latency is None:
            costs = macs_of_tiles(share, model, specs, shape, apply_fn)
        else:
            costs = times_of_tiles(
                share,
                dense_ms,
                {path: sites[path] for path in specs},
                specs,
                batch_size=num_inputs(timed),
                dtype=dtype or sites[next(iter(specs))].kernel.dtype,
                progress=progress,
            )
        found.append(Candidates(specs, costs))
    search_of = functools.partial(
        ThresholdSearch,
        model,
        variables,
        images=images,
        batch_size=batch_size,
        apply_fn=apply_fn,
    )
    chosen = choose_tiles(found, lambda some: search_of(*some), progress)
    what = "no fewer MACs" if latency is None else "no less time"
    for path in found[0].specs:
        if path not in chosen.specs:
            kept[path] = f"takes {what} with every tile closed"
    kept = {path: reason for path, reason in kept.items() if matches(path, layers)}

    def network_at(
        state: SearchState, more: Inputs
    ) -> tuple[nn.Module, dict[str, Any]]:
        if all(rate == 1 for rate in state.rates.values()):
            return original, variables
        inertial, changed = _gated(model, variables, chosen.specs, state, kept)
        if not running_statistics(variables) or not takes_train(model, apply_fn):
            return inertial, changed
        # Recalibration uses the measured thresholds, not the quantiles of each batch.
        still = inertial.clone(plan=inertial.plan.with_fixed_thresholds())
        return inertial, recalibrate_batch_norm(
            still, changed, more, batch_size=batch_size, apply_fn=apply_fn
        )

    def tighten(state: SearchState, budget: float) -> float:
        before, after = measure_ms([(model, variables), network_at(state, images)])
        if after <= share * before:
            return budget
        return min(share * before / after * budget, _LEAST_STEP * state.cost)

    state = search_of(*chosen).run(
        share * chosen.costs.dense,
        progress,
        tighten=None if latency is None else tighten,
    )
    return network_at(state, images if recalibration is None else recalibration)


def _gated(
    model: Any,
    variables: Mapping[str, Any],
    specs: Mapping[str, Inertial],
    state: SearchState,
    kept: Mapping[str, str],
) -> tuple[Any, dict[str, Any]]:
    """Returns a network and variables with the rates and thresholds of a state.

    Layers of rate 1 stay as they are.
    """
    places = layer_places(variables["params"])
    rules: list[tuple[str, Inertial]] = []
    thresholds: dict[tuple[str, ...], Any] = {}
    for path, spec in specs.items():
        rate = state.rates[path]
        if rate == 1:
            continue
        target = Rate(rate) if rate else Fixed.CLOSED
        rules.append((as_glob(path), dataclasses.replace(spec, threshold=target)))
        dtype = leaves_at(variables, path)["kernel"].dtype
        threshold = state.thresholds[path] if rate else CLOSED
        thresholds[places[path]] = jnp.asarray(threshold, dtype)
    inertial = model.clone(plan=Plan((*rules, *model.plan.rules)))
    if isinstance(inertial, Planned):
        every = {**dict(inertial.kept), **kept}
        inertial = inertial.clone(kept=tuple(every.items()))
    return inertial, with_thresholds(variables, thresholds)


def _with_plan(model: nn.Module) -> Any:
    """Returns the model with a plan, which has nothing inertial.

    Raises:
        ValueError: The model is inertial already.
    """
    plan = plan_of(model)
    if plan is None:
        return Planned(model)
    for glob, spec in plan.rules:
        if isinstance(core_of(spec), Inertial):
            raise ValueError(f"`model` has inertial layers already: {glob!r}, {spec}.")
    return model


def _check_options(
    macs: Any, latency: Any, sizes: Any, batch_size: int, latency_batch: int
) -> None:
    given = {"macs": macs, "latency": latency}
    shares = {name: as_python(v) for name, v in given.items() if v is not None}
    if len(shares) != 1:
        raise ValueError(
            f"exactly one of `macs` (={macs}) and `latency` (={latency}) must be given."
        )
    for name, share in shares.items():
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"`{name}` (={share!r}) must be in (0, 1].")
    for name, size in (("batch_size", batch_size), ("latency_batch", latency_batch)):
        if size < 1:
            raise ValueError(f"`{name}` (={size}) must be >= 1.")
    if not sizes or any(not isinstance(n, int) or n < 2 for n in sizes):
        words = ", ".join(map(str, sizes))
        raise ValueError(
            f"`tile_size` (={words}) must be whole, >= 2, or several such."
        )


def _tileable(
    model: nn.Module,
    sites: Mapping[str, Site],
    kept: dict[str, str],
    image_shape: Shape,
    layers: str,
    tile_size: int,
    settings: Mapping[str, Any],
    apply_fn: ApplyFn | None,
) -> dict[str, Inertial]:
    """Returns specs for the matched convolutions that can be tiled, by path.

    Why others cannot is put into `kept`, by path.
    """
    specs: dict[str, Inertial] = {}
    for path, site in sites.items():
        if site.spec != Conv() or not matches(path, layers):
            continue
        if site.num_axes != 2:
            kept[path] = "is not two-dimensional"
            continue
        side = min(site.kernel.shape[:2])
        # The friction of a 1x1 convolution costs about as much as closed tiles save.
        if side == 1:
            continue
        if site.kernel.shape[:2] != (side, side):
            kept[path] = "has filters that are not square"
            continue
        region = side + tile_size - 1
        specs[path] = Inertial(side, region, threshold=Fixed(OPEN), **settings)
    rules = tuple((as_glob(path), spec) for path, spec in specs.items())
    trial = model.clone(plan=Plan((*rules, *model.plan.rules)))
    for rule in dropped_rules(trial, image_shape, apply_fn=apply_fn):
        if specs.pop(rule.path, None):
            kept[rule.path] = rule.reason
    if not specs:
        raise ValueError(
            f"`layers` (={layers!r}) matches no convolution of stride 1 with filters "
            f"larger than 1 x 1{reasons(kept, layers)}."
        )
    return specs
