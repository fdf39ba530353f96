"""Ranks for a chip that is not there, by what its compiler estimates."""

import math

import jax
import numpy as np
import pytest
from own_cnn import OwnCNN

import inertia_jax as ij
from inertia_jax.compression import latency
from inertia_jax.compression.sites import Site, find_sites

SHAPE = (8, 8, 3)
# The share of the network's time that is none of its layers'.
REST = 0.1


@pytest.fixture(scope="module")
def network():
    model = OwnCNN(10, [16, 16, 64, 64, 64])
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *SHAPE)))
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def fake_cost(x, kernels):
    """A chip on which factors of sixteen channels cost more than what they replace."""
    cost = math.prod(x) * sum(math.prod(kernel) for kernel in kernels)
    return cost * (100 if len(kernels) > 1 and x[-1] <= 16 else 1)


@pytest.fixture
def fake(network, monkeypatch):
    """The fake compiler: layers, their costs, that of the network, what was asked."""
    sites = find_sites(*network, SHAPE)
    asked = []

    def cost_of(path, spec):
        site = sites[path]
        return fake_cost((64, *site.calls[0][0]), site.kernel_shapes(spec))

    total = sum(cost_of(path, ij.Conv()) for path in sites) / (1 - REST)

    def estimated_ms(function, *shapes, device, any_layout=False):
        assert device == "v5e"
        assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
        if not any_layout:
            return total
        x, kernels = jax.tree.map(lambda leaf: leaf.shape, shapes)
        asked.append((x, kernels))
        return fake_cost(x, kernels)

    monkeypatch.setattr(latency, "_estimated_ms", estimated_ms)
    return sites, cost_of, total, asked


def test_ranks_for_a_chip_take_its_time(network, fake):
    sites, cost_of, total, asked = fake
    budget = ij.Budget(latency=0.6, device="v5e")
    message = "no form of them is faster on v5e, .*: Conv_0, Conv_1, Conv_2."
    with pytest.warns(UserWarning, match=message):
        small, _ = ij.compress(*network, ranks=budget, image_shape=SHAPE)
    specs = {path: small.plan.spec(path) for path in sites}
    taken = sum(cost_of(path, spec) for path, spec in specs.items())
    assert 0.4 * total < REST * total + taken <= 0.6 * total
    dense = [path for path, spec in specs.items() if spec == ij.Conv()]
    assert dense[:3] == ["Conv_0", "Conv_1", "Conv_2"] and len(dense) < 5
    factors = [spec for spec in specs.values() if spec != ij.Conv()]
    assert {rank % 8 for s in factors for rank in (s.rank_in, s.rank_out)} == {0}
    # Both layers of 64 channels have one geometry, whose forms are compiled once:
    # 8, 16, 24, 32 and 48 for both ranks, and eight pairs of unlike ones.
    wide = [kernels for x, kernels in asked if x[-1] == 64]
    assert len(wide) == 1 + 5 + 8


def test_a_budget_that_a_chip_cannot_meet_says_the_least(network, fake):
    budget = ij.Budget(latency=0.1, device="v5e")
    with (
        pytest.warns(UserWarning, match="no form of them is faster"),
        pytest.raises(ValueError, match=r"`latency` \(=0.1\) must be at least 0.\d+"),
    ):
        ij.compress(*network, ranks=budget, image_shape=SHAPE)


def test_a_device_has_a_name_and_goes_with_latency():
    with pytest.raises(ValueError, match=r"must be one of v4, .* mean v5p\?"):
        ij.Budget(latency=0.5, device="v5")
    with pytest.raises(ValueError, match=r"`device` \(='v5e'\) must be None without"):
        ij.Budget(macs=0.5, device="v5e")


@pytest.mark.slow
def test_the_compiler_says_what_a_chip_gains(
    network, monkeypatch, tmp_path, no_shape_checks
):
    pytest.importorskip("libtpu", reason="needs libtpu, which the extra `tpu` brings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer = Site(
        path="conv",
        kernel=np.zeros((3, 3, 256, 256)),
        groups=1,
        strides=(1, 1),
        padding="SAME",
        dilation=(1, 1),
        calls=(((8, 8, 256), (8, 8, 256)),),
        spec=ij.Conv(),
        core=ij.Conv(),
    )
    specs = [ij.Conv(), ij.Tucker2(32, 32), ij.Tucker2(192, 192)]
    dense, small, large = latency.site_latencies_ms(
        layer, specs, batch_size=256, device="v5e"
    )
    # Its factors take fewer MACs at either rank.
    assert layer.macs(specs[2]) < layer.macs(specs[0])
    assert 0 < small < dense < large
    assert latency.model_latency_ms(*network, SHAPE, batch_size=8, device="v5e") > 0
    assert len(list(tmp_path.rglob("*.json"))) == 4
