"""What inertial layers cost, counted by hand."""

import math

import jax.numpy as jnp
import pytest
from flax import linen as nn

import inertia_jax as ij

WINDOW = {"core_size": 1, "region_size": 3}
TILED = {"core_size": 3, "region_size": 4, "reading": "tiled"}


class One(nn.Module):
    """An inertial layer of someone's own network: four features of three channels."""

    layer: dict

    @nn.compact
    def __call__(self, x):
        return ij.InertialConv(4, **self.layer, name="layer")(x)


def count(layer, size=8, **options):
    (row,) = ij.count_cost(One(layer), (size, size, 3), **options).rows
    return row


# Of each of 8 neighbours and 3 channels: a difference, a magnitude and a sum.
REGION = 3 * 3 * 8


@pytest.mark.parametrize(
    ("options", "params", "macs", "other_ops", "dense_macs"),
    [
        # 8 x 8 regions see a core map of 10 x 10; of 9 terms each output is a sum.
        ({}, 12 + 4, 100 * 12, 64 * (REGION + 4 * 9), 64 * 108),
        ({"combine": "max"}, 16, 100 * 12, 64 * (REGION + 4 * 9), 64 * 108),
        ({"combine": "weighted"}, 25, 100 * 12, 64 * (REGION + 4 * 18), 64 * 108),
        # Two cores at each output, the second on weighted sums of 8 x 8 x 3 inputs.
        (
            {"combine": "weighted_input"},
            16 + 27,
            2 * 64 * 12,
            64 * (REGION + 3 * 18),
            64 * 108,
        ),
        # Half the filters, as many outputs.
        ({"combine": "stack"}, 6 + 4, 100 * 6, 64 * (REGION + 2 * 9), 64 * 108),
        # At stride 2, 4 x 4 outputs: two cores each, inputs summed over 7 x 7 ...
        ({"strides": 2}, 16, 2 * 16 * 12, 16 * REGION + 49 * 3 * 9, 16 * 108),
        # ... but a maximum needs the core map, over 9 x 9.
        (
            {"strides": 2, "combine": "max"},
            16,
            81 * 12,
            16 * (REGION + 4 * 9),
            16 * 108,
        ),
        # A sum is taken at each of the 7 x 7 places between.
        (
            {"strides": 2, "combine": "weighted_channel"},
            16 + 36,
            81 * 12,
            16 * REGION + 49 * 4 * 18,
            16 * 108,
        ),
        ({"channel_stride": 2}, 16, 1200, 64 * (2 * 3 * 8 + 36), 64 * 108),
        # 12 neighbours; the mean of 4 pixels is 4 differences and sums, and is
        # subtracted from each neighbour.
        (
            {"core_size": 2, "region_size": 4, "reference": "core_mean"},
            48 + 4,
            100 * 48,
            64 * (3 * (36 + 8 + 12) + 36),
            64 * 192,
        ),
        # The core, and its middle tap, at each of 64 places; 12 pixels around it.
        (
            {"core_size": 2, "region_size": 4, "combine": "weighted_periphery"},
            48 + 4 + 12,
            64 * (48 + 12),
            64 * (3 * 36 + 2 * 16 * 3),
            64 * 192,
        ),
        # Noise is counted as one operation a channel.
        ({"metric": "random"}, 16, 1200, 64 * (3 + 36), 64 * 108),
    ],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else "",
)
def test_a_window_layer_costs_the_same_whatever_its_gates_do(
    options, params, macs, other_ops, dense_macs
):
    for rate in (0.0, 1.0):
        row = count({**WINDOW, **options}, gate_rates={"layer": rate})
        assert (row.kind, row.gate_rate, row.params) == ("inertial", rate, params)
        assert row.macs == row.core_macs == row.ladder_macs == macs
        assert row.other_ops == other_ops
        assert row.dense_macs == dense_macs


# 16 tiles of 2 x 2 outputs; of a tile, one core evaluation costs 3 * 3 * 3 * 4.
CORE, EVERY = 16 * 108, 64 * 108
# 7 neighbours; box means of 2 x 2, of the 9 x 9 pixels that the cores see.
FRICTION, BOX = 16 * 3 * 3 * 7, 81 * 3 * 4


@pytest.mark.parametrize(
    ("rate", "macs", "ladder_macs"),
    [
        (0.0, CORE, CORE),
        (0.25, CORE + (EVERY - CORE) // 4, CORE + (EVERY - CORE) // 2),
        (0.5, CORE + (EVERY - CORE) // 2, CORE + (EVERY - CORE) // 2),
        (0.6, CORE + round(0.6 * (EVERY - CORE)), EVERY),
        (1.0, EVERY, EVERY),
    ],
)
def test_a_tiled_layer_costs_its_open_tiles(rate, macs, ladder_macs):
    layer = {**TILED, "capacities": (1 / 8, 1 / 2, 1)}
    row = count(layer, gate_rates={"layer": rate})
    assert (row.macs, row.ladder_macs) == (macs, ladder_macs)
    assert (row.core_macs, row.dense_macs) == (CORE, EVERY)
    assert (row.params, row.other_ops) == (112, FRICTION + BOX)
    row = count({**TILED, "capacities": None}, gate_rates={"layer": rate})
    assert (row.macs, row.ladder_macs) == (macs, EVERY)


def test_bfloat16_saves_no_output_of_an_open_tile():
    layer = {**TILED, "dtype": jnp.bfloat16, "capacities": (1 / 2, 1)}
    row = count(layer, gate_rates={"layer": 0.25})
    assert (row.macs, row.ladder_macs) == (CORE + EVERY // 4, CORE + EVERY // 2)
    assert count(layer, gate_rates={"layer": 1.0}).macs == EVERY


def test_options_of_tiles_are_counted():
    assert count({**TILED, "low": "sample"}).other_ops == FRICTION
    halved = count({**TILED, "channel_stride": 2, "metric": "max"}).other_ops
    assert halved == FRICTION * 2 // 3 + BOX
    # Where no tile can open, no friction is computed; the window reading computes it.
    closed = {"threshold": ij.Fixed.CLOSED}
    assert count({**TILED, **closed}).other_ops == BOX
    row = count({**WINDOW, **closed})
    assert (row.gate_rate, row.other_ops) == (0, 64 * (REGION + 4 * 9))
    # 7 x 7 outputs still take 16 tiles, all of them computed where all are open.
    row = count(TILED, size=7)
    assert (row.output_shape, row.dense_macs) == ((7, 7, 4), 49 * 108)
    assert (row.macs, row.core_macs) == (EVERY, CORE)


@pytest.fixture
def model():
    # Regions larger than the filters that they replace.
    window = ij.Inertial(1, 5, threshold=ij.Learned(0.5))
    tiled = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.25))
    plan = ij.Plan((("conv1", window), ("conv2", tiled)))
    return ij.create_model("lenet", width=0.25, plan=plan)


def test_dense_macs_are_those_of_the_network_without_a_plan(model):
    table = ij.count_cost(model, (28, 28, 1))
    dense = ij.count_cost(model.clone(plan=ij.Plan()), (28, 28, 1))
    rows = {row.path: row for row in dense.rows}
    for row in table.rows:
        assert (row.dense_macs or row.macs) == rows[row.path].macs
    assert table.dense_macs == dense.macs == dense.dense_macs == dense.ladder_macs
    assert table.total_macs == table.macs + math.ceil(table.other_ops / 2)
    lines = str(table).splitlines()
    assert f"{table.total_macs:,} MACs" in lines[-1]
    assert f"{table.total_macs / dense.macs:.3f} of the dense network's" in lines[-1]


def test_a_rate_is_counted_at_its_target_unless_measured(model):
    rates = {r.path: r.gate_rate for r in ij.count_cost(model, (28, 28, 1)).rows}
    assert rates == {"conv1": 1.0, "conv2": 0.25, "fc1": None, "fc2": None}
    rows = ij.count_cost(model, (28, 28, 1), gate_rates={"conv2": 0.125}).rows
    assert [row.gate_rate for row in rows[:2]] == [1.0, 0.125]
    # 144 tiles of 8 channels to 16, one in eight of them open.
    assert rows[1].macs == 144 * 9 * 8 * 16 * (1 + 3 / 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"conv9": 0.5}, "'conv9', which is no inertial layer"),
        ({"fc1": 0.5}, "'fc1', which is no inertial layer"),
        ({"conv1": 1.1}, "1.1 for 'conv1'.* in \\[0, 1\\]"),
        ({"conv2": -0.1}, "-0.1 for 'conv2'.* in \\[0, 1\\]"),
        ({"conv2": math.nan}, "nan for 'conv2'.* in \\[0, 1\\]"),
    ],
)
def test_bad_gate_rates_are_refused(model, rates, message):
    with pytest.raises(ValueError, match=message):
        ij.count_cost(model, (28, 28, 1), gate_rates=rates)
