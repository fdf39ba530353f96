"""Whole networks compressed, and multiplied out again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from inertia_jax.compression import budget
from inertia_jax.compression.calibration import divergence
from inertia_jax.compression.ranks import rank_by_rule
from inertia_jax.compression.sites import Site, find_sites
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.layers.kinds import kind_of
from inertia_jax.models.resnet_cifar import CifarResNet
from inertia_jax.ops.tucker.unfold import max_ranks

KEY = jax.random.key(0)
SHAPE = (32, 32, 3)


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kernels(variables):
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    return {k.removesuffix("/kernel"): np.asarray(v) for k, v in flat.items()}


def outputs(model, variables, x):
    return np.asarray(jax.jit(model.apply)(variables, x))


def assert_same_outputs(a, b, x):
    """Full rank loses only float32's rounding, over some ten layers."""
    expected = outputs(*a, x)
    np.testing.assert_allclose(
        outputs(*b, x), expected, atol=2e-5 * np.abs(expected).max()
    )


@pytest.fixture(scope="module")
def network():
    """Random weights of spectra that fall, some steeply, as training makes them."""
    model = CifarResNet(depth=8, width=0.5, shortcut="B")
    variables = ij.init_variables(model, KEY)
    rng = np.random.default_rng(0)

    def fall(leaf):
        if leaf.ndim != 4:
            return leaf
        least = rng.choice([0.3, 0.003])
        scales = (np.geomspace(1, least, n) for n in leaf.shape[2:])
        mixes = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in leaf.shape[2:])
        into, out = (m * s @ m.T for m, s in zip(mixes, scales, strict=True))
        return jnp.asarray(np.einsum("hwio,ip,oq->hwpq", leaf, into, out), leaf.dtype)

    return model, {**variables, "params": jax.tree.map(fall, variables["params"])}


@pytest.fixture(scope="module")
def dense_cost(network):
    return ij.count_cost(network[0], SHAPE)


@pytest.fixture(scope="module")
def budgeted(network):
    return ij.compress(*network, ranks=ij.Budget(macs=0.5))


def tucker_ranks(model):
    return {
        path: (spec.rank_in, spec.rank_out)
        for path, spec in model.plan.rules
        if isinstance(spec, ij.Tucker2)
    }


def test_ratio_gives_the_published_ranks_of_resnet18():
    model = ij.create_model("resnet18", stem="imagenet", num_classes=1000)
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 224, 224, 3)))
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    sites = find_sites(model, blank, (224, 224, 3))
    found = {
        path: rank_by_rule(ij.Ratio(0.2), site, site.kernel, round_to=1)
        for path, site in sites.items()
    }
    of = {3: 1, 64: 12, 128: 25, 256: 51, 512: 102}  # max(1, int(0.2 c))
    stem_out = 12  # 9 x 49 x 3 and more: no unfolding lowers a rank
    expected = {"conv1": ij.Tucker2(of[3], stem_out)}
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        before = max(64, channels // 2)
        for block in range(2):
            name = f"layer{stage}_{block}"
            c_in = before if block == 0 else channels
            expected[f"{name}/conv1"] = ij.Tucker2(of[c_in], of[channels])
            expected[f"{name}/conv2"] = ij.Tucker2(of[channels], of[channels])
            if block == 0 and stage > 1:
                pair = ij.Tucker2(of[before], of[channels])
                expected[f"{name}/downsample_0"] = ij.Tucker2(
                    pair.rank_in,
                    min(pair.rank_out, *max_ranks((1, 1, before, channels))),
                )
    assert len(expected) == 20
    assert found == expected
    assert found["layer2_0/downsample_0"] == ij.Tucker2(12, 25)
    assert found["layer4_0/downsample_0"] == ij.Tucker2(51, 102)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "method"), [(ij.Ratio(1.0), "hooi"), (ij.Energy(1.0), "hosvd")], ids=str
)
def test_full_rank_is_the_same_network(network, rule, method):
    model, variables = ij.compress(
        *network, ranks=rule, method=method, only_cheaper=False
    )
    kinds = {type(spec) for _, spec in model.plan.rules}
    assert len(model.plan.rules) == 9
    one = isinstance(rule, ij.Ratio)
    assert kinds == ({ij.Tucker2} if one else {ij.Tucker2, ij.LowRank})
    assert_same_outputs(network, (model, variables), noise(4, *SHAPE))


@pytest.mark.slow
@pytest.mark.parametrize(("of", "share"), [("macs", 0.7), ("params", 0.4)])
def test_a_budget_is_met_and_used(network, dense_cost, of, share):
    model, variables = ij.compress(*network, ranks=ij.Budget(**{of: share}))
    cost = getattr(ij.count_cost(model, SHAPE), of)
    total = getattr(dense_cost, of)
    assert 0.95 * share * total < cost <= share * total
    # What the budget counted is what stands there.
    sites = find_sites(*network, SHAPE)
    specs = {path: model.plan.spec(path) for path in sites}
    counted = total - sum(
        getattr(site, of)(ij.Conv()) - getattr(site, of)(specs[path])
        for path, site in sites.items()
    )
    assert counted == cost
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == ij.count_cost(model, SHAPE).params


def relative_errors(model, variables, network):
    again = kernels(ij.decompress(model, variables)[1])
    return sum(
        np.sum((again[path] - kernel) ** 2) / np.sum(kernel**2)
        for path, kernel in kernels(network[1]).items()
        if kernel.ndim == 4
    )


@pytest.mark.slow
def test_a_budget_loses_less_than_a_ratio_of_the_same_macs(network, dense_cost):
    uniform = ij.compress(*network, ranks=ij.Ratio(0.5))
    share = ij.count_cost(uniform[0], SHAPE).macs / dense_cost.macs
    assert share < 0.8
    chosen = ij.compress(*network, ranks=ij.Budget(macs=share))
    assert ij.count_cost(chosen[0], SHAPE).macs <= share * dense_cost.macs
    ours = relative_errors(*chosen, network)
    assert ours < 0.7 * relative_errors(*uniform, network)


@pytest.mark.slow
def test_hooi_is_no_worse_a_network_than_hosvd(network, budgeted):
    plan = ij.Plan(budgeted[0].plan.rules)
    hooi = ij.compress(*network, ranks=plan, method="hooi")
    assert hooi[0].plan == plan
    error = relative_errors(*hooi, network)
    assert error < relative_errors(*budgeted, network)


@pytest.mark.parametrize("ranks", [(3, 7), (8, 2)])
def test_hooi_of_1x1_layers_keeps_unequal_ranks(network, ranks):
    plan = ij.Plan((("layer2_0/shortcut_0", ij.Tucker2(*ranks)),))
    hooi, hosvd = (
        ij.compress(*network, ranks=plan, method=method) for method in ("hooi", "hosvd")
    )
    assert hooi[0].plan == hosvd[0].plan == plan
    kernel = network[1]["params"]["layer2_0"]["shortcut_0"]["kernel"][0, 0]
    tail = np.linalg.svd(kernel, compute_uv=False)[min(ranks) :]
    for compressed in (hooi, hosvd):
        # Both are the truncated SVD, up to float32's rounding.
        error = relative_errors(*compressed, network)
        expected = np.sum(tail**2) / np.sum(np.square(kernel))
        np.testing.assert_allclose(error, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_names_the_least(network, dense_cost):
    with pytest.raises(ValueError, match=r"`macs` \(=0.001\) must be at least") as e:
        ij.compress(*network, ranks=ij.Budget(macs=0.001))
    least = float(str(e.value).split("at least ")[1].split(",")[0])
    model, _ = ij.compress(*network, ranks=ij.Budget(macs=least))
    cost = ij.count_cost(model, SHAPE).macs
    assert cost <= least * dense_cost.macs
    assert set(tucker_ranks(model).values()) == {(1, 1)}
    with pytest.raises(ValueError, match="at least"):
        ij.compress(*network, ranks=ij.Budget(macs=least - 2e-4))


def test_a_latency_budget_measures_the_network(monkeypatch):
    """On a clock on which factors within a network take half the time of their MACs."""
    from inertia_jax.compression import budget, layer_times

    model = ij.create_model("lenet", width=0.5)
    network = model, ij.init_variables(model, KEY)
    shape = (28, 28, 1)
    monkeypatch.setattr(
        layer_times,
        "site_latencies_ms",
        lambda site, specs, **_: [float(site.macs(spec)) for spec in specs],
    )

    def clock(networks, shape, **_):
        rows = [ij.count_cost(model, shape).rows for model, _ in networks]
        return [sum(r.macs / (2 if r.ranks else 1) for r in row) for row in rows]

    monkeypatch.setattr(budget, "network_latencies_ms", clock)
    small = ij.compress(*network, ranks=ij.Budget(latency=0.5, batch_size=2))
    before, after = clock([network, small], shape)
    # Few forms are timed, so that steps are large.
    assert 0.35 * before < after <= 0.5 * before


@pytest.mark.slow
def test_a_latency_budget_runs_on_the_clock(monkeypatch):
    from inertia_jax.compression import layer_times

    clock, shown = layer_times.site_latencies_ms, {}

    def measured(site, specs, **options):
        shown[site.path] = clock(site, specs, **options)
        return shown[site.path]

    monkeypatch.setattr(layer_times, "_TIMED_FORMS", 2)
    monkeypatch.setattr(layer_times, "site_latencies_ms", measured)
    model = ij.create_model("lenet", width=0.25)
    variables = ij.init_variables(model, KEY)
    least = ij.Budget(latency=1e-9, batch_size=4)
    with pytest.raises(ValueError, match="with each layer in its fastest form"):
        ij.compress(model, variables, ranks=least, layers="conv2")
    assert list(shown) == ["conv2"]
    assert len(shown["conv2"]) > 1
    assert all(0 < ms < 10_000 for ms in shown["conv2"])
    # Nothing need change for all of the time, and nothing is measured.
    all_of_it = ij.Budget(latency=1.0, batch_size=4)
    assert ij.compress(model, variables, ranks=all_of_it)[0] is model
    assert list(shown) == ["conv2"]


def test_explicit_ranks_go_where_their_globs_say(network):
    plan = ij.Plan(
        (
            ("layer1_0/conv1", ij.Conv()),
            ("layer[12]_0/conv*", ij.Tucker2(2, 3)),
            ("*shortcut_0", ij.LowRank(2)),
        )
    )
    model, variables = ij.compress(*network, ranks=plan)
    paths = ["layer1_0/conv2", "layer2_0/conv1", "layer2_0/conv2"]
    assert tucker_ranks(model) == dict.fromkeys(paths, (2, 3))
    two = [path for path, spec in model.plan.rules if spec == ij.LowRank(2)]
    assert two == ["layer2_0/shortcut_0", "layer3_0/shortcut_0"]
    changed = {*paths, *two}
    new, old = kernels(variables), kernels(network[1])
    for name, leaf in old.items():
        if name not in changed:
            np.testing.assert_array_equal(new[name], leaf)
    kernel = old["layer1_0/conv2"]
    expected = ij.ops.tucker2(kernel, rank_in=2, rank_out=3)
    np.testing.assert_allclose(new["layer1_0/conv2/core"], expected.core, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "none*"}, r"`layers` \(='none\*'\) matches no convolution"),
        ({"ranks": ij.Plan((("none*", ij.Tucker2(1, 1)),))}, r"`ranks` has 'none\*'"),
        (
            {"ranks": ij.Plan((("conv1", ij.Tucker2(4, 1)),))},
            r"`rank_in` \(=4\) of 'conv1' must be in \[1, 3\]",
        ),
        (
            {"ranks": ij.Plan((("*shortcut_0", ij.LowRank(9)),))},
            r"`rank` \(=9\) of 'layer2_0/shortcut_0' must be in \[1, 8\]",
        ),
        (
            {"ranks": ij.Plan((("conv1", ij.LowRank(1)),))},
            "whose filters are 3 x 3; must be 1 x 1",
        ),
        (
            {"ranks": ij.Plan((("conv1", ij.Inertial(1, 3)),))},
            "must hold Tucker2, LowRank and Conv",
        ),
        (
            {"ranks": ij.Plan((("conv1", ij.Tucker2(1, 1, core=ij.Inertial(1, 3))),))},
            "its core must be Conv",
        ),
        ({"ranks": 0.5}, r"`ranks` \(=0.5\) must be a Ratio"),
        ({"round_to": 0}, r"`round_to` \(=0\) must be >= 1"),
        ({"linear": "fc"}, r"`linear` \(='fc'\) must be True or False"),
        ({"calibration": np.zeros((2, 32, 32), np.float32)}, "`calibration` .*must be"),
        ({"calibration": np.full((2, *SHAPE), np.nan)}, "`calibration` must be finite"),
        ({"calibration": np.zeros((0, *SHAPE), np.float32)}, "n >= 1"),
    ],
)
def test_bad_arguments_are_named(network, options, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        ij.compress(*network, **{"ranks": ij.Ratio(0.5), **options})


def with_nan(variables, *path):
    flat = traverse_util.flatten_dict(variables["params"])
    flat[path] = flat[path].at[(0,) * flat[path].ndim].set(np.nan)
    return {**variables, "params": traverse_util.unflatten_dict(flat)}


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused(network):
    model, variables = network
    broken = with_nan(variables, "layer2_0", "conv1", "kernel")
    with pytest.raises(ValueError, match="kernel of 'layer2_0/conv1' must be finite"):
        ij.compress(model, broken, ranks=ij.Ratio(0.5))
    broken = with_nan(variables, "layer2_0", "bn1", "scale")
    with pytest.raises(ValueError, match="inputs of 'layer2_0/conv2'.*must be finite"):
        ij.compress(model, broken, ranks=ij.Ratio(0.5), calibration=noise(2, *SHAPE))
    broken = with_nan(variables, "linear", "kernel")
    budget = ij.Budget(macs=0.5)
    with pytest.raises(ValueError, match="outputs on `calibration` must be finite"):
        ij.compress(model, broken, ranks=budget, calibration=noise(2, *SHAPE))


@pytest.mark.slow
def test_options_leave_layers_and_round_ranks(network):
    model, _ = ij.compress(*network, ranks=ij.Ratio(0.5), keep_stem=True)
    assert "conv1" not in tucker_ranks(model)
    model, _ = ij.compress(*network, ranks=ij.Ratio(0.5))
    # 8 channels in, at 32 x 32: 8 x 4 + 9 x 4 x 4 + 4 x 8 MACs a position.
    assert tucker_ranks(model)["layer1_0/conv1"] == (4, 4)
    assert tucker_ranks(model)["conv1"] == (1, 4)
    # 3/4 of the channels cost a 1x1 convolution more than it is: 8 x 4 + 16 + 64 > 128.
    model, _ = ij.compress(*network, ranks=ij.Ratio(0.75), layers="*shortcut_0")
    assert not model.plan.rules and model is network[0]
    model, _ = ij.compress(
        *network, ranks=ij.Ratio(0.3), layers="layer3_*", round_to=8, only_cheaper=False
    )
    # int(0.3 x 16) = 4 and int(0.3 x 32) = 9; at most the channels there are.
    assert tucker_ranks(model)["layer3_0/conv1"] == (8, 16)
    assert tucker_ranks(model)["layer3_0/conv2"] == (16, 16)
    model, _ = ij.compress(*network, ranks=ij.Budget(macs=0.6), round_to=4)
    for (r_in, r_out), path in ((r, p) for p, r in tucker_ranks(model).items()):
        assert path == "conv1" or (r_in % 4, r_out % 4) == (0, 0)


def test_energy_and_evbmf_look_at_the_spectra():
    model = ij.create_model("lenet", width=0.5)
    variables = ij.init_variables(model, KEY)
    rng = np.random.default_rng(0)
    factors = ij.ops.Tucker2Factors(
        *(rng.normal(size=s) for s in ((16, 3), (3, 3, 3, 5), (32, 5)))
    )
    planted = np.asarray(ij.ops.tucker2_to_kernel(factors))
    planted = planted + 1e-3 * rng.normal(size=planted.shape)
    variables["params"]["conv2"]["kernel"] = jnp.asarray(planted, jnp.float32)
    for rule in (ij.Energy(0.9999), ij.Evbmf()):
        new, _ = ij.compress(model, variables, ranks=rule, layers="conv2")
        assert tucker_ranks(new) == {"conv2": (3, 5)}


@pytest.mark.slow
def test_compressing_again_lowers_ranks_and_counts_shares_of_dense(
    network, dense_cost, budgeted
):
    again = ij.compress(*budgeted, ranks=ij.Budget(macs=0.3))
    cost = ij.count_cost(again[0], SHAPE).macs
    assert 0.28 * dense_cost.macs < cost <= 0.3 * dense_cost.macs
    first, second = (tucker_ranks(model) for model, _ in (budgeted, again))
    assert first.keys() <= second.keys()
    assert all(np.less_equal(second[p], first[p]).all() for p in first)
    # At its own share there is nothing to do.
    same = ij.compress(*budgeted, ranks=ij.Budget(macs=0.5))
    assert same[0] is budgeted[0]


def test_a_budget_counts_other_compressed_layers_as_they_are(network, dense_cost):
    first = ij.compress(*network, ranks=ij.Budget(macs=0.75), layers="layer3_*")
    second = ij.compress(*first, ranks=ij.Budget(macs=0.6), layers="layer2_*")
    cost = ij.count_cost(second[0], SHAPE).macs
    assert 0.58 * dense_cost.macs < cost <= 0.6 * dense_cost.macs


def test_explicit_ranks_leave_other_compressed_layers_alone(network, budgeted):
    plan = ij.Plan((("layer3_0/conv2", ij.Tucker2(1, 1)),))
    again, _ = ij.compress(*budgeted, ranks=plan, only_cheaper=False)
    expected = {**tucker_ranks(budgeted[0]), "layer3_0/conv2": (1, 1)}
    assert tucker_ranks(again) == expected


class ThreeShapes(nn.Module):
    """Convolutions that are factorised, each of another shape."""

    @nn.compact
    def __call__(self, x):
        for features, side in ((6, 3), (10, 3), (7, 1)):
            x = nn.relu(nn.Conv(features, (side, side))(x))
        return x.mean((1, 2))


def test_a_layer_compiles_a_program_for_its_ranks_and_one_for_its_factors():
    """NumPy arranges kernels: JAX would compile each reshape of each shape."""
    names = []

    def note(event, _, *, fun_name="", **__):
        # Arrays that go to devices are programs of this name, of no time.
        if event.endswith("/backend_compile_duration") and fun_name != "jit(stage)":
            names.append(fun_name)

    shape = (9, 9, 5)
    variables = jax.device_get(ThreeShapes().init(KEY, noise(1, *shape)))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        small = ij.compress(
            ThreeShapes(), variables, ranks=ij.Budget(macs=0.5), image_shape=shape
        )
        num_to_compress = len(names)
        ij.decompress(*small, image_shape=shape)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert num_to_compress <= 2 * 3
    assert len(names) <= 3 * 3


def test_decompress_is_the_inverse(network, budgeted):
    dense = ij.decompress(*budgeted)
    assert dense[0] == network[0]
    assert_same_outputs(budgeted, dense, noise(4, *SHAPE))
    shapes = jax.tree.map(jnp.shape, dense[1])
    assert shapes == jax.tree.map(jnp.shape, dict(network[1]))
    # What stays as it is comes back as it was.
    assert ij.decompress(*network)[0] is network[0]


@pytest.mark.slow
@pytest.mark.parametrize("is_weighed", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups", "spec"),
    [
        ((3, 3, 6, 8), 1, ij.Tucker2(3, 5)),
        ((3, 2, 3, 8), 2, ij.Tucker2(2, 3)),
        ((5, 4, 6), 1, ij.Tucker2(4, 2)),
        ((3, 3, 1, 4), 2, ij.Tucker2(1, 1)),
        ((1, 1, 6, 8), 1, ij.LowRank(3)),
        ((1, 1, 3, 8), 2, ij.LowRank(2)),
        ((6, 8), 1, ij.LowRank(3)),
    ],
)
def test_the_kernel_of_factors_needs_no_factors(shape, groups, spec, is_weighed):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape).astype(np.float32)
    one = (1,) * (len(shape) - 2)
    site = Site("conv", kernel, groups, one, "SAME", one, (), ij.Conv(), ij.Conv())
    roots = rng.normal(size=(groups, shape[-2], shape[-2]))
    moment = (roots @ roots.swapaxes(1, 2)).astype(np.float32) if is_weighed else None
    layer = WeighedKernel(site, moment)
    factors = layer.factors(spec)
    expected = kind_of(spec).to_kernel(factors, groups=groups)
    found = layer.dense_kernel(spec)
    np.testing.assert_allclose(found, np.reshape(expected, shape), atol=2e-4)


@pytest.mark.slow
def test_inertial_cores_are_left_alone_and_have_no_dense_kernel():
    core = ij.Inertial(3, 4, reading="tiled")
    plan = ij.Plan((("conv2", ij.Tucker2(4, 5, core=core)),))
    model = ij.create_model("lenet", width=0.25, plan=plan)
    variables = ij.init_variables(model, KEY)
    with pytest.raises(ValueError, match="which no dense kernel equals"):
        ij.decompress(model, variables)
    stem, changed = ij.compress(model, variables, ranks=ij.Ratio(0.5))
    assert stem.plan.rules == (("conv1", ij.Tucker2(1, 4)), *plan.rules)
    assert changed["params"]["conv2"] is not None
    logits = jax.eval_shape(stem.apply, changed, noise(1, 28, 28, 1))
    assert logits.shape == (1, 10)
    with pytest.raises(ValueError, match="matches no convolution"):
        ij.compress(model, variables, ranks=ij.Ratio(0.5), layers="conv2")


@pytest.mark.slow
@pytest.mark.parametrize("side", [1, 5])
def test_filters_of_another_size_keep_it(side):
    plan = ij.Plan((("conv2", ij.Conv(kernel_size=side)),))
    model = ij.create_model("lenet", width=0.25, plan=plan)
    network = model, ij.init_variables(model, KEY)
    x = noise(2, 28, 28, 1)
    rules = [ij.Ratio(1.0), ij.Energy(1.0), ij.Plan((("conv2", ij.Tucker2(8, 16)),))]
    for rule in rules[: 2 if side == 1 else 3]:
        factorised = ij.compress(*network, ranks=rule, only_cheaper=False)
        assert factorised[0].plan.spec("conv2").core == ij.Conv(kernel_size=side)
        assert_same_outputs(network, factorised, x)
        dense = ij.decompress(*factorised)
        assert dense[0].plan == plan
        assert_same_outputs(network, dense, x)
    ij.compress(*network, ranks=ij.Budget(macs=0.6))


def test_a_checkpoint_keeps_the_compressed_network(tmp_path):
    model = ij.create_model("lenet", width=0.25)
    network = model, ij.init_variables(model, KEY)
    compressed = ij.compress(*network, ranks=ij.Budget(macs=0.6))
    assert tucker_ranks(compressed[0])
    ij.save_checkpoint(tmp_path / "checkpoint", *compressed)
    model, variables = ij.load_checkpoint(tmp_path / "checkpoint")
    assert model == compressed[0]
    for name, leaf in kernels(compressed[1]).items():
        np.testing.assert_array_equal(kernels(variables)[name], leaf)


class TwoLayers(nn.Module):
    """Inputs of the second layer live in three of its eight channels' directions."""

    groups: int = 1
    size: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (1, 1), name="mix")(x)
        size = (self.size, self.size)
        x = nn.Conv(8, size, feature_group_count=self.groups, name="conv")(x)
        return x.reshape(x.shape[0], -1)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "size"), [(1, 3), (2, 3), (1, 1), (2, 1)])
def test_images_show_which_directions_matter(groups, size):
    model = TwoLayers(groups, size)
    x = noise(16, 6, 6, 2 * groups)
    variables = model.init(KEY, x)
    # Each group sees two directions, whatever they are.
    mix = np.zeros((2 * groups, 8), np.float32)
    for g in range(groups):
        width = 8 // groups
        mix[2 * g : 2 * g + 2, g * width : (g + 1) * width] = noise(2, width, seed=g)
    variables["params"]["mix"]["kernel"] = jnp.asarray(mix)[None, None]
    spec = ij.Tucker2(2, 8 // groups) if size == 3 else ij.LowRank(2)
    options = dict(ranks=ij.Plan((("conv", spec),)), only_cheaper=False)
    plain = ij.compress(model, variables, image_shape=x.shape[1:], **options)
    weighed = ij.compress(model, variables, calibration=x, **options)
    dense = outputs(model, variables, x)
    blind, seeing = (
        np.linalg.norm(outputs(*found, x) - dense) / np.linalg.norm(dense)
        for found in (plain, weighed)
    )
    # The inputs' other directions count a thousandth, so that weights stay bounded.
    assert blind > 0.1
    assert seeing < 5e-3


@pytest.mark.slow
def test_a_budget_with_images_is_spent_and_never_worse_than_without(monkeypatch):
    model = ij.create_model("lenet", width=0.25)
    network = model, ij.init_variables(model, KEY)
    x = noise(16, 28, 28, 1)
    total = ij.count_cost(model, (28, 28, 1)).macs
    logits = jnp.asarray(outputs(*network, x))
    found = {}
    # What is measured may be flat, fall, or say nothing of the layers together.
    for how, measured in {
        "as it is": None,
        "flat": lambda lost: np.minimum(lost, 0.05),
        "wrong": lambda lost: 1 - lost,
    }.items():
        if measured is not None:
            wrong = lambda *args, as_=measured: dict.fromkeys(args[1], as_)  # noqa: E731
            monkeypatch.setattr(budget, "measured_errors", wrong)
        for images in (None, x):
            new = ij.compress(
                *network, ranks=ij.Budget(macs=0.5), calibration=images, batch_size=16
            )
            used = ij.count_cost(new[0], (28, 28, 1)).macs / total
            assert 0.45 < used <= 0.5
            others = jnp.asarray(outputs(*new, x))
            found[how, images is not None] = divergence(logits, others).mean()
        assert found[how, True] <= found[how, False] * (1 + 1e-3), found


class Block(nn.Module):
    """Convolutions that `setup` makes, one of them called twice."""

    def setup(self):
        self.twice = nn.Conv(6, (3, 3))
        self.grouped = nn.Conv(6, (3, 3), feature_group_count=2, padding="CIRCULAR")
        self.one = nn.Conv(6, (1, 1), use_bias=False)

    def __call__(self, x):
        x = nn.relu(self.twice(x))[:, ::2, ::2]
        x = nn.relu(self.twice(inputs=x))
        return self.one(self.grouped(x)) + x


class Foreign(nn.Module):
    """Someone else's network: `nn.compact` around `setup`, 1D convolutions too."""

    norm: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (5, 5), strides=2)(x)
        x = Block()(x)
        x = Block(name="last")(x)
        rows = x.mean(2)
        rows = nn.Conv(6, (3,), name="rows")(rows)
        rows = nn.Conv(6, 3, name="rows_again")(rows)
        return nn.Dense(5)(rows.mean(1))


class ForeignNorm(nn.Module):
    """With BatchNorm, and `train`."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for features in (6, 8):
            x = nn.Conv(features, (3, 3), kernel_dilation=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Holder(nn.Module):
    """A network given to it, and layers between."""

    body: nn.Module
    head: nn.Module

    def __call__(self, x):
        return self.head(nn.relu(self.body(x)).mean((1, 2)))


def of_fields():
    layers = [nn.Conv(6, (5, 5), strides=2), nn.relu, Block()]
    return Holder(nn.Sequential(layers), nn.Dense(5))


def sequential():
    pool = lambda x: x.mean((1, 2))  # noqa: E731
    return nn.Sequential([nn.Conv(6, (3, 3)), nn.relu, Block(), pool, nn.Dense(5)])


@pytest.fixture(scope="module", params=[Foreign, ForeignNorm, of_fields, sequential])
def foreign(request):
    model = request.param()
    variables = model.init(KEY, noise(1, 16, 16, 3))
    return model, variables


compress_foreign = functools.partial(ij.compress, image_shape=(16, 16, 3))


@pytest.mark.slow
def test_a_foreign_network_at_full_rank_is_the_same(foreign):
    model, variables = compress_foreign(
        *foreign, ranks=ij.Ratio(1.0), only_cheaper=False
    )
    assert isinstance(model, ij.Planned) and model.unplanned is foreign[0]
    x = noise(2, 16, 16, 3)
    assert_same_outputs(foreign, (model, variables), x)
    # Layers keep their names; what is no factorised layer keeps its parameters.
    old, new = kernels(foreign[1]), kernels(variables)
    paths = [path for path, _ in model.plan.rules]
    every = {path for path, leaf in old.items() if leaf.ndim > 2}  # no linear layer
    assert set(paths) == every
    left = {name for name in new if not name.startswith(tuple(f"{p}/" for p in paths))}
    assert left == set(old) - every - {f"{path}/bias" for path in paths}
    for name in left:
        np.testing.assert_array_equal(new[name], old[name])
    fresh = jax.eval_shape(model.init, KEY, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)
    back = ij.decompress(model, variables, image_shape=(16, 16, 3))
    assert_same_outputs(foreign, back, x)
    assert kernels(back[1]).keys() == old.keys()


@pytest.mark.slow
def test_a_foreign_network_trains_on(foreign):
    model, variables = compress_foreign(*foreign, ranks=ij.Ratio(0.5))
    assert model.plan.rules
    x = noise(4, 16, 16, 3)
    stats = {k: v for k, v in variables.items() if k != "params"}
    options = {"train": True} if stats else {}

    @jax.jit
    def gradient(params):
        def loss(params):
            y, _ = model.apply(
                {**stats, "params": params}, x, mutable=[*stats], **options
            )
            return (y**2).sum()

        return jax.grad(loss)(params)

    for path, _ in model.plan.rules:
        node = gradient(variables["params"])
        for name in path.split("/"):
            node = node[name]
        assert all(np.abs(node[p]["kernel"]).max() > 0 for p in ("u_in", "u_out"))


@pytest.mark.slow
def test_a_foreign_network_is_counted_and_kept_to_a_budget(foreign):
    total = ij.count_cost(foreign[0], (16, 16, 3)).macs
    for calibration in (None, noise(4, 16, 16, 3)):
        model, variables = compress_foreign(
            *foreign, ranks=ij.Budget(macs=0.6), calibration=calibration
        )
        cost = ij.count_cost(model, (16, 16, 3)).macs
        # Of few layers, a step from one form to the next is large.
        assert 0.3 * total < cost <= 0.6 * total
        assert np.isfinite(outputs(model, variables, noise(2, 16, 16, 3))).all()
    with pytest.raises(ValueError, match="`image_shape` .*must be given"):
        ij.compress(*foreign, ranks=ij.Ratio(0.5))


class _Holder(nn.Module):
    """A network whose field has the name that a wrapper's might have."""

    model: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.model(x)


class _LowerCase(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), padding="same", precision="highest")(x)
        return nn.Conv(8, (3, 3), padding="SAME_LOWER", strides=2)(x)


@pytest.mark.parametrize("make", [lambda: _Holder(_LowerCase()), _LowerCase])
def test_fields_and_paddings_of_any_name_are_taken(make):
    x = noise(2, 8, 8, 4)
    variables = make().init(KEY, x)
    model, changed = ij.compress(
        make(),
        variables,
        ranks=ij.Ratio(1.0),
        only_cheaper=False,
        image_shape=(8, 8, 4),
    )
    found = model.apply(changed, x)
    np.testing.assert_allclose(found, make().apply(variables, x), rtol=1e-4, atol=1e-5)
    assert ij.count_cost(model, (8, 8, 4)).params > 0


class _Auxiliary(nn.Module):
    """A head that is there in training alone."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3))(x)
        if train:
            nn.Dense(3, name="aux")(x)
        return x.mean((1, 2))


@pytest.mark.slow
def test_what_evaluation_does_not_use_is_kept():
    x = noise(2, 8, 8, 4)
    variables = _Auxiliary().init(KEY, x, train=True)
    _, changed = ij.compress(
        _Auxiliary(), variables, ranks=ij.Ratio(0.5), image_shape=(8, 8, 4)
    )
    assert changed["params"]["aux"] == variables["params"]["aux"]
    lenet = ij.create_model("lenet", width=0.25)
    variables = ij.init_variables(lenet, KEY, (32, 32, 1))
    model, _ = ij.compress(lenet, variables, ranks=ij.Ratio(0.5))
    assert model.plan.rules


@pytest.mark.slow
def test_variables_of_another_network_are_refused():
    model = ij.create_model("resnet20", width=0.25)
    wide = ij.init_variables(ij.create_model("resnet20", width=0.5), KEY)
    for variables in (wide, {}, {"params": {}}):
        with pytest.raises(ValueError, match="`variables` do not belong to `model`"):
            ij.compress(model, variables, ranks=ij.Ratio(0.5))
    with pytest.raises(ValueError, match="`variables` do not belong to `model`"):
        ij.to_torch(model, wide)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("Conv_0", ij.LowRank(1)), r"whose filters are \(5, 5\); must be 1 x 1"),
        (("Conv_0", ij.Tucker2(4, 1)), r"`rank_in` \(=4\) must be in \[1, 3\]"),
    ],
)
def test_planned_refuses_what_it_cannot_do(rule, message):
    model = ij.Planned(Foreign(), ij.Plan((rule,)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, noise(1, 16, 16, 3))


@pytest.mark.slow
def test_a_depthwise_convolution_stays_within_a_latency_budget():
    """It has no cheaper form, and none is timed."""

    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), feature_group_count=4, padding="REFLECT")(x)
            return x.mean((1, 2))

    x = noise(2, 8, 8, 4)
    model = Depthwise()
    variables = model.init(KEY, x)
    all_of_it, half = (ij.Budget(latency=s, batch_size=2) for s in (1.0, 0.5))
    assert ij.compress(model, variables, ranks=all_of_it, calibration=x)[0] is model
    with pytest.raises(
        ValueError, match=r"`latency` \(=0.5\) is met by no ranks: .* 1"
    ):
        ij.compress(model, variables, ranks=half, calibration=x)
