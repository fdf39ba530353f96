"""Ranks for a chip that is not there, by what its compiler estimates."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_cnn import OwnCNN

import inertia_jax as ij
from inertia_jax.compression import budget, layer_times
from inertia_jax.compression import chip_times as chip_times_file
from inertia_jax.compression.allocation import Forms
from inertia_jax.compression.chip_times import ChipTimes, _as_bfloat16, chip_times
from inertia_jax.compression.sites import find_sites
from inertia_jax.compression.whole_network import network_in
from inertia_jax.layers.kinds import ranks_of

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def network():
    model = OwnCNN(10, [16, 16, 64, 64, 64])
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *SHAPE)))
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def fake_cost(kernels):
    """A chip on which factors of sixteen channels cost more than what they replace."""
    cost = float(sum(map(np.size, kernels)))
    return cost * (100 if len(kernels) > 1 and kernels[0].shape[-2] <= 16 else 1)


@pytest.fixture
def fake(network, monkeypatch):
    """The fake compiler: its function, and the networks that it has compiled.

    A network takes some time besides its layers, and more if most of them have factors.
    """
    compiled = []

    def times(network, image_shape, *, device, batch_size, apply_fn=None):
        assert (device, batch_size, image_shape) == ("v5e", 32, SHAPE)
        params = network[1]["params"]
        compiled.append(network)
        layers = {
            path: fake_cost([k for k in jax.tree.leaves(params[path]) if k.ndim > 1])
            for path in params
            if path.startswith("Conv_")
        }
        factors = sum("core" in params[path] for path in layers)
        return ChipTimes(sum(layers.values()) + 5e3 + 1e3 * factors**2, layers)

    monkeypatch.setattr(budget, "chip_times", times)
    monkeypatch.setattr(layer_times, "chip_times", times)
    return functools.partial(
        times, image_shape=SHAPE, device="v5e", batch_size=32
    ), compiled


def compress(network, share):
    ranks = ij.Budget(latency=share, device="v5e", batch_size=32)
    return ij.compress(*network, ranks=ranks, image_shape=SHAPE)


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_the_network_takes_the_share_of_a_chips_time(network, fake, share):
    times, compiled = fake
    message = "no form of them is faster on v5e, .*: Conv_0, Conv_1, Conv_2."
    with pytest.warns(UserWarning, match=message):
        small = compress(network, share)
    num_compiled = len(compiled)
    total = times(network).ms
    assert 0.9 * share * total <= times(small).ms <= share * total
    specs = [small[0].plan.spec(f"Conv_{i}") for i in range(5)]
    assert specs[:3] == [ij.Conv()] * 3
    factors = [spec for spec in specs if spec != ij.Conv()]
    assert factors
    assert {rank % 8 for s in factors for rank in (s.rank_in, s.rank_out)} == {0}
    # The dense one; five shares of the ranks, alike on both sides, and two pairs of
    # unlike ones; the dense one twice; and four that are chosen, each beside it.
    assert num_compiled <= 1 + 7 + 2 + 2 * 4


def test_a_budget_that_a_chip_cannot_meet_says_what_the_network_takes(network, fake):
    times, _ = fake
    with pytest.warns(UserWarning, match="no form of them is faster"):
        with pytest.raises(ValueError, match=r"`latency` \(=0.1\) must be at") as e:
            compress(network, 0.1)
        least = float(re.search(r"at least (0.\d+)", str(e.value))[1])
        small = compress(network, least)
        with pytest.raises(ValueError, match="each layer in its fastest form"):
            compress(network, least - 2e-4)
    assert times(small).ms / times(network).ms == pytest.approx(least, abs=1e-4)


def test_all_of_the_time_changes_nothing(network, fake):
    assert compress(network, 1.0)[0] is network[0]
    assert len(fake[1]) == 1


def test_layers_are_marked_and_all_is_bfloat16(monkeypatch, network):
    lowered = []

    def lower_here(function, *shapes, chip):
        assert chip == "v5e"
        assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
        lowered.append(jax.jit(function).lower(*shapes).as_text(debug_info=True))

    def cycles(program, *, chip, marks):
        assert {*(f"Conv_{i}" for i in range(5)), "Dense_0"} <= {*marks}
        return 3_000_000, {"Conv_0": 1_500_000.0}

    monkeypatch.setattr(chip_times_file, "lower_for", lower_here)
    monkeypatch.setattr(chip_times_file, "cached_cycles", cycles)
    small = ij.compress(
        *network, ranks=ij.Plan((("Conv_4", ij.Tucker2(8, 8)),)), image_shape=SHAPE
    )
    times = functools.partial(chip_times, device="v5e", batch_size=4)
    assert times(network, SHAPE) == times(small, SHAPE)
    # By the clock of the chip, 1.5 GHz.
    assert times(small, SHAPE) == ChipTimes(2.0, {"Conv_0": 1.0})
    assert all("mark<Conv_4>" in text for text in lowered)
    assert "tensor<4x8x8x8xbf16>" in lowered[1]


@pytest.mark.parametrize("wraps", [False, True])
def test_networks_compute_in_bfloat16_where_they_can(wraps):
    model = ij.create_model("lenet", width=0.1)
    model = ij.Planned(model) if wraps else model
    found = _as_bfloat16(model)
    assert (found.unplanned if wraps else found).dtype == jnp.bfloat16
    assert type(found) is type(model)
    assert _as_bfloat16(OwnCNN(2, [4])) == OwnCNN(2, [4])


def test_a_device_has_a_name_and_goes_with_latency():
    with pytest.raises(ValueError, match=r"must be one of v4, .* mean v5p\?"):
        ij.Budget(latency=0.5, device="v5")
    with pytest.raises(ValueError, match=r"`device` \(='v5e'\) must be None without"):
        ij.Budget(macs=0.5, device="v5e")


@pytest.mark.slow
def test_the_compiler_says_what_a_chip_gains(monkeypatch, tmp_path, no_shape_checks):
    pytest.importorskip("libtpu", reason="needs libtpu, which the extra `tpu` brings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = functools.partial(
        chip_times, image_shape=SHAPE, device="v5e", batch_size=256
    )
    model = OwnCNN(10, [256, 256])
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *SHAPE)))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    found = [times((model, variables))]
    for rank in (32, 192):
        sites = find_sites(model, variables, SHAPE)
        specs = {"Conv_1": ij.Tucker2(rank, rank)}
        # Its factors take fewer MACs at either rank.
        assert sites["Conv_1"].macs(specs["Conv_1"]) < sites["Conv_1"].macs(ij.Conv())
        found.append(times(network_in((model, variables), sites, specs)))
    dense, small, large = (each.layers["Conv_1"] for each in found)
    assert 0 < small < dense < large
    for each in found:
        assert {*each.layers} == {"Conv_0", "Conv_1", "Dense_0"}
        assert 0.9 * each.ms < sum(each.layers.values()) <= each.ms
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_ranks_in_pairs_are_compiled_in_pairs_and_single_ones_singly():
    model = ij.create_model("lenet", width=0.5)
    sites = find_sites(model, ij.init_variables(model, jax.random.key(0)), (28, 28, 1))
    site = sites["conv2"]
    for specs, wanted in (
        (
            [ij.Tucker2(a, b) for a in (2, 4, 6, 8, 12, 16) for b in (4, 8, 16)],
            [(2, 4), (4, 4), (6, 4), (8, 8), (12, 8), (4, 8), (8, 4)],
        ),
        (
            [ij.LowRank(r) for r in (1, 2, 4, 8)],
            [(1,), (2,), (2,), (4,), (4,), (2,), (2,)],
        ),
    ):
        # Those that take no fewer MACs than the dense layer are left out.
        costs = np.array([site.macs(ij.Conv()) - 1.0] * len(specs))
        grid = Forms(tuple(specs), costs, np.zeros(len(specs)))
        places = layer_times._to_compile(site, grid)
        found = [ranks_of(specs[place]) for place in places]
        assert found == wanted  # of two that are as near, the first
        dear = Forms(grid.specs, costs + 1, grid.errors)
        assert layer_times._to_compile(site, dear) == [None] * len(places)
