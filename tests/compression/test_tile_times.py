"""Networks made inertial within a share of their time, on a clock of the test's own."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inertia_jax as ij
from inertia_jax.compression import inertial, tile_costs
from inertia_jax.compression.sites import Site
from inertia_jax.compression.thresholds import Candidates, choose_tiles
from inertia_jax.compression.tile_costs import CostCurve, TileCosts

IMAGES = np.random.default_rng(0).normal(size=(8, 28, 28, 1)).astype(np.float32)
# The whole network takes 50 ms: tiles make `conv1` slower, and `conv2` up to five times
# as fast.
CURVES = {
    "conv1": CostCurve(10.0, (0.0, 1.0), (11.0, 20.0)),
    "conv2": CostCurve(30.0, (0.0, 1.0), (6.0, 33.0)),
}
# Tiles take this longer in the network than by themselves.
MORE_MS = 3.0


@pytest.fixture(scope="module")
def lenet():
    model = ij.create_model("lenet", width=0.2)
    return model, ij.init_variables(model, jax.random.key(0))


def time_of(model):
    taken = 50.0
    for path, spec in model.plan.rules:
        threshold = spec.threshold
        rate = threshold.target if isinstance(threshold, ij.Rate) else 0.0
        taken += CURVES[path].at(rate) - CURVES[path].dense + MORE_MS
    return taken


@pytest.fixture
def clock(monkeypatch):
    """Takes the place of the clock, and has the networks that were timed."""
    timed = []

    def network_times(networks, **_):
        timed.append(networks)
        return [time_of(model) for model, _ in networks]

    monkeypatch.setattr(inertial, "network_latencies_ms", network_times)
    monkeypatch.setattr(
        tile_costs, "layer_times", lambda site, *_, **__: CURVES[site.path]
    )
    return timed


def test_the_network_keeps_to_the_time_and_slower_layers_stay_dense(lenet, clock):
    model, variables = ij.make_inertial(*lenet, latency=0.6, calibration=IMAGES)
    ((path, spec),) = model.plan.rules
    assert path == "conv2" and variables["thresholds"].keys() == {"conv2"}
    # Layers by themselves promise 30 ms at a rate of (30 - 26) / 27, the network not.
    assert 0 < spec.threshold.target < 4 / 27
    assert 0.98 * 30 < time_of(model) <= 30
    assert len(clock) > 2


@pytest.mark.parametrize(
    ("share", "message"),
    [
        # 26 of 50 ms with every tile of `conv2` closed, and 29 in the network.
        (0.5, r"`latency` \(=0.5\) must be at least 0.52\d*, .* every tile closed"),
        (0.55, r"`latency` \(=0.55\) must be at least 0.5[78]\d*, "),
    ],
)
def test_a_time_that_cannot_be_met_is_refused(lenet, clock, share, message):
    with pytest.raises(ValueError, match=message):
        ij.make_inertial(*lenet, latency=share, calibration=IMAGES)


def test_tiles_that_pay_nowhere_are_refused(lenet, clock, monkeypatch):
    monkeypatch.setitem(CURVES, "conv2", CURVES["conv1"])
    with pytest.raises(ValueError, match="`latency` .* is met by no tiles"):
        ij.make_inertial(*lenet, latency=0.99, calibration=IMAGES)
    model, variables = ij.make_inertial(*lenet, latency=1.0, calibration=IMAGES)
    assert model is lenet[0]
    jax.tree.map(np.testing.assert_array_equal, variables, dict(lenet[1]))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `macs` .* and `latency`"),
        ({"macs": 0.5, "latency": 0.5}, "exactly one of `macs` .* and `latency`"),
        ({"latency": 0.0}, r"`latency` .*in \(0, 1\]"),
        ({"latency": 0.5, "latency_batch": 0}, "`latency_batch` .*>= 1"),
        ({"macs": 0.5, "tile_size": (2, 1)}, r"`tile_size` \(=2, 1\) .*>= 2"),
        ({"macs": 0.5, "tile_size": 2.5}, r"`tile_size` \(=2.5\) .*>= 2"),
        ({"macs": 0.5, "tile_size": ()}, "`tile_size` .*>= 2"),
    ],
)
def test_bad_options_are_refused(lenet, options, message):
    with pytest.raises(ValueError, match=message):
        ij.make_inertial(*lenet, calibration=IMAGES, **options)


def test_each_layer_takes_the_tiles_that_cost_least_for_what_they_save():
    # Divergences and times with every tile closed, by size of tiles and layer.
    divergences = {2: {"a": 1.0, "b": 1.0, "c": 0.1}, 4: {"a": 1.5, "b": 3.0, "c": 1.0}}
    closed_ms = {2: {"a": 8.0, "b": 6.0, "c": 10.0}, 4: {"a": 6.0, "b": 5.0, "c": 7.0}}
    every = []
    for size, times in closed_ms.items():
        specs = {path: ij.Inertial(3, 2 + size, reading="tiled") for path in times}
        curves = {p: CostCurve(10.0, (0.0, 1.0), (ms, 11.0)) for p, ms in times.items()}
        every.append(Candidates(specs, TileCosts("latency", 0.5, 40.0, curves)))

    def search_of(candidates):
        size = next(iter(candidates.specs.values())).region_size - 2
        assert ("c" in candidates.specs) == (size == 4)  # else nothing is saved
        return types.SimpleNamespace(
            closed=lambda path: types.SimpleNamespace(
                divergence=divergences[size][path]
            )
        )

    told = []
    chosen = choose_tiles(every, search_of, lambda *counts: told.append(counts))
    # For a millisecond: 1 / 2 and 1.5 / 4; 1 / 4 and 3 / 5.
    sizes = {path: spec.region_size - 2 for path, spec in chosen.specs.items()}
    assert sizes == {"a": 4, "b": 2, "c": 4}
    assert {p: c.costs[0] for p, c in chosen.costs.curves.items()} == {
        "a": 6.0,
        "b": 6.0,
        "c": 7.0,
    }
    assert told == [("trying sizes of tiles", done, 2) for done in range(3)]


@pytest.mark.slow
def test_sizes_of_tiles_are_chosen_within_a_budget_of_macs(lenet):
    model, variables = ij.make_inertial(
        *lenet, macs=0.45, tile_size=(2, 3, 4), calibration=IMAGES
    )
    _, sown = model.apply(variables, IMAGES, mutable=["intermediates"])
    rates = {
        path: float(sown["intermediates"][path]["gate_rate"][0].mean())
        for path, _ in model.plan.rules
    }
    cost = ij.count_cost(model, (28, 28, 1), gate_rates=rates)
    allowed = 0.45 * cost.dense_macs + len(cost.rows)
    assert 0.98 * allowed < cost.total_macs <= allowed


def test_a_type_that_spares_no_output_keeps_to_its_budget(lenet):
    model = lenet[0].clone(dtype=jnp.bfloat16)
    spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed.OPEN)
    shape = (28, 28, 1)
    costs = tile_costs.macs_of_tiles(0.5, model, {"conv2": spec}, shape, None)
    tiled = model.clone(plan=ij.Plan((("conv2", spec),)))
    for rate in (0.1, 0.5, 0.75, 0.9):
        counted = ij.count_cost(tiled, shape, gate_rates={"conv2": rate}).total_macs
        np.testing.assert_allclose(costs.of({"conv2": rate}), counted, atol=1)
    closed = model.clone(
        plan=ij.Plan((("conv2", dataclasses.replace(spec, threshold=ij.Fixed.CLOSED)),))
    )
    counted = ij.count_cost(closed, shape).total_macs
    np.testing.assert_allclose(costs.of({"conv2": 0.0}), counted, atol=1)


@pytest.mark.slow
def test_layers_are_timed_dense_and_at_shares_of_open_tiles():
    shape = (12, 12, 8)
    site = Site(
        path="",
        kernel=np.zeros((3, 3, 8, 8), np.float32),
        groups=1,
        strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dilation=(1, 1),
        calls=((shape, shape),) * 2,
        spec=ij.Conv(),
        core=ij.Conv(),
    )
    spec = ij.Inertial(3, 4, reading="tiled")
    curve = tile_costs.layer_times(site, spec, batch_size=2, dtype=np.float32)
    assert curve.rates[0] == 0 and list(curve.rates) == sorted(curve.rates)
    assert min(curve.dense, *curve.costs) > 0
    assert curve.at(0.0) == curve.costs[0] and curve.at(1.0) == curve.dense
