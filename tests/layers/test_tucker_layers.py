"""Factorised convolutions as layers: beside `nn.Conv`, in networks, and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax import ops
from inertia_jax.ops.tucker.factors import factor_kernels

KEY = jax.random.key(0)
# float32 products of some 40 terms, in another order.
CLOSE = dict(rtol=1e-4, atol=2e-5)


def images(*shape, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def flat(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(tree)}


def three(kernel, groups=1):
    """The parameters of `Tucker2Conv` at full rank, from a dense kernel."""
    factors = ops.tucker2(
        kernel,
        rank_in=kernel.shape[2],
        rank_out=kernel.shape[3] // groups,
        groups=groups,
    )
    kernels = factor_kernels(factors, groups=groups)
    return dict(zip(("u_in", "core", "u_out"), kernels, strict=True))


def with_bias(kernels, last, bias):
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    if bias is not None:
        params[last]["bias"] = bias
    return {"params": params}


CASES = [
    dict(strides=2, padding=((1, 1), (0, 2)), use_bias=False),
    dict(padding="VALID", kernel_dilation=2),
    dict(strides=(2, 1), feature_group_count=2, padding=1),
    dict(padding="CIRCULAR"),
    dict(strides=None, kernel_dilation=None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tucker2_conv_at_full_rank_is_nn_conv(case):
    conv = nn.Conv(6, (3, 2), bias_init=nn.initializers.normal(), **case)
    x = images(2, 8, 7, 4)
    variables = conv.init(KEY, x)
    dense = variables["params"]
    groups = case.get("feature_group_count", 1)
    layer = ij.Tucker2Conv(6, (3, 2), 4 // groups, 6 // groups, **case)
    ours = with_bias(three(dense["kernel"], groups), "u_out", dense.get("bias"))
    fresh = jax.eval_shape(layer.init, KEY, x)
    shapes = {name: leaf.shape for name, leaf in flat(fresh).items()}
    assert {name: leaf.shape for name, leaf in flat(ours).items()} == shapes
    np.testing.assert_allclose(
        jax.jit(layer.apply)(ours, x), conv.apply(variables, x), **CLOSE
    )


@pytest.mark.parametrize("lead", [(), (3, 2)])
def test_leading_dimensions_are_taken_as_nn_conv_takes_them(lead):
    x = images(*lead, 5, 5, 4)
    for make, dense in (
        (ij.Tucker2Conv(6, 3, 2, 3), nn.Conv(6, (3, 3))),
        (ij.LowRankConv(6, 2), nn.Conv(6, (1, 1))),
    ):
        y, variables = make.init_with_output(KEY, x)
        assert y.shape == jax.eval_shape(dense.init_with_output, KEY, x)[0].shape
        one_by_one = make.apply(variables, x.reshape(-1, 5, 5, 4))
        np.testing.assert_allclose(y, one_by_one.reshape(y.shape), **CLOSE)


@pytest.mark.parametrize(
    "case",
    [
        dict(strides=2, padding="VALID", use_bias=False),
        dict(feature_group_count=2, padding=1),
        dict(strides=(1, 2)),
    ],
    ids=str,
)
def test_low_rank_conv_at_full_rank_is_nn_conv(case):
    conv = nn.Conv(6, (1, 1), bias_init=nn.initializers.normal(), **case)
    x = images(2, 5, 6, 4)
    variables = conv.init(KEY, x)
    dense = variables["params"]
    groups = case.get("feature_group_count", 1)
    rank = min(4, 6) // groups
    two = ops.low_rank(dense["kernel"], rank=rank, groups=groups)
    kernels = factor_kernels(two, groups=groups)
    kernels = dict(zip(("left", "right"), kernels, strict=True))
    ours = with_bias(kernels, "right", dense.get("bias"))
    layer = ij.LowRankConv(6, rank, **case)
    shapes = {
        n: leaf.shape for n, leaf in flat(jax.eval_shape(layer.init, KEY, x)).items()
    }
    assert {name: leaf.shape for name, leaf in flat(ours).items()} == shapes
    np.testing.assert_allclose(
        jax.jit(layer.apply)(ours, x), conv.apply(variables, x), **CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [ij.Tucker2Conv(6, 3, 2, 3), ij.LowRankConv(6, 3)], ids=["tucker2", "two"]
)
def test_types_are_those_of_nn_conv(layer):
    x = images(2, 5, 5, 4)
    variables = layer.init(KEY, x)
    y = layer.apply(variables, x)
    assert y.dtype == jnp.float32
    half = layer.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16
    # Three roundings to 8 bits.
    assert np.linalg.norm(half.astype(jnp.float32) - y) < 0.02 * np.linalg.norm(y)
    stored = layer.clone(param_dtype=jnp.bfloat16).init(KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}
    gradient = jax.grad(lambda v: (layer.apply(v, x) ** 2).sum())(variables)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (ij.Tucker2Conv(6, 3, 5, 3), r"`rank_in` \(=5\) must be in \[1, 4\]"),
        (ij.Tucker2Conv(6, 3, 0, 3), r"`rank_in` \(=0\)"),
        (ij.Tucker2Conv(6, 3, 4, 7), r"`rank_out` \(=7\) must be in \[1, 6\]"),
        (
            ij.Tucker2Conv(6, 3, 2, 4, feature_group_count=2),
            r"`rank_out` \(=4\) must be in \[1, 3\]",
        ),
        (
            ij.Tucker2Conv(6, 3, 1, 1, feature_group_count=3),
            r"`feature_group_count` \(=3\) must divide 4 input and 6 output",
        ),
        (ij.Tucker2Conv(64, 1, 4, 5), r"`rank_out` \(=5\) must be in \[1, 4\]"),
        (ij.LowRankConv(6, 5), r"`rank` \(=5\) must be in \[1, 4\]"),
        (ij.LowRankConv(6, 0), r"`rank` \(=0\)"),
        (ij.LowRankConv(6, 3, feature_group_count=2), r"must be in \[1, 2\]"),
        (ij.LowRankConv(6, 1, feature_group_count=4), "must divide 4 input and 6"),
        (
            ij.Tucker2Conv(
                6, 1, 2, 2, kernel_dilation=2, core=ij.Inertial(1, 3, reading="tiled")
            ),
            "must have neither groups nor dilation",
        ),
    ],
)
def test_layers_refuse_what_does_not_fit(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, KEY, images(1, 5, 5, 4))


NETWORKS = [
    ("lenet", {}, "conv2", (28, 28, 1)),
    ("resnet20", {"width": 0.5, "shortcut": "B"}, "layer2_0/conv1", (32, 32, 3)),
    ("resnet18", {"width": 0.125}, "layer2_0/conv1", (32, 32, 3)),
    ("vgg16", {"width": 0.125}, "features_7", (32, 32, 3)),
    ("simpledla", {"width": 0.25}, "layer3/left/conv1", (32, 32, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "path", "shape"), NETWORKS, ids=str)
def test_every_network_takes_factors_and_counts_them(name, options, path, shape):
    dense = ij.create_model(name, **options)
    before = {row.path: row for row in ij.count_cost(dense, shape).rows}
    plan = ij.Plan(((path, ij.Tucker2(3, 5)), ("*shortcut_0", ij.LowRank(2))))
    if not any("shortcut_0" in p for p in before):
        plan = ij.Plan(plan.rules[:1])
    model = ij.create_model(name, plan=plan, **options)
    table = ij.count_cost(model, shape)
    after = {row.path: row for row in table.rows}
    assert list(after) == list(before)
    old, new = before[path], after[path]
    h, w, c_out = new.output_shape
    assert new.output_shape == old.output_shape
    bias = c_out if name in ("lenet", "vgg16") else 0
    c_in = (old.params - bias) // (9 * c_out)
    stride = 2 if "layer2_0" in path else 1
    # lenet pads nothing: the first factor sees two rows and columns more.
    before_core = (h * stride + 2 * (name == "lenet")) ** 2
    assert new.params == 3 * c_in + 9 * 3 * 5 + 5 * c_out + bias
    assert new.macs == before_core * 3 * c_in + h * w * (9 * 3 * 5 + 5 * c_out)
    assert (new.kind, new.ranks, new.dense_macs) == ("tucker2", (3, 5), old.macs)
    for place in (p for p in after if p.endswith("shortcut_0")):
        h, w, c_out = after[place].output_shape
        c_in = before[place].params // c_out
        assert after[place].params == 2 * (c_in + c_out)
        assert after[place].macs == h * w * 2 * (c_in + c_out)
        assert (after[place].kind, after[place].ranks) == ("low_rank", (2,))
    unchanged = [p for p in before if p != path and not p.endswith("shortcut_0")]
    assert [after[p] for p in unchanged] == [before[p] for p in unchanged]
    assert table.dense_macs == sum(row.macs for row in before.values())
    logits = jax.eval_shape(
        lambda key, x: model.init_with_output(key, x)[0], KEY, jnp.zeros((2, *shape))
    )
    assert logits.shape == (2, 10)


def test_the_table_shows_ranks_and_the_share_of_dense():
    model = ij.create_model("lenet", plan=ij.Plan((("conv2", ij.Tucker2(8, 16)),)))
    table = ij.count_cost(model, (28, 28, 1))
    text = str(table).splitlines()
    assert text[0].split()[:4] == ["layer", "output", "ranks", "parameters"]
    assert text[2].split()[:3] == ["conv2", "24x24x64", "8,16"]
    share = table.macs / 11_992_448
    assert text[-1] == f"{share:.3f} of the dense network's MACs"


def test_networks_refuse_what_a_plan_cannot_have():
    x = jnp.zeros((1, 28, 28, 1))
    for spec, message in (
        (ij.LowRank(4), r"LowRank\(rank=4\) at 'conv2', whose filters are 3 x 3"),
        (ij.Tucker2(33, 4), r"`rank_in` \(=33\) must be in \[1, 32\]"),
        (ij.Tucker2(4, 65), r"`rank_out` \(=65\) must be in \[1, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model = ij.create_model("lenet", plan=ij.Plan((("conv2", spec),)))
            jax.eval_shape(model.init, KEY, x)


TILED = ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed.OPEN)


def planned_lenet(spec):
    return ij.create_model("lenet", width=0.25, plan=ij.Plan((("conv2", spec),)))


@pytest.mark.slow
def test_an_inertial_core_with_open_gates_is_the_ordinary_core():
    x = images(2, 28, 28, 1)
    ordinary = planned_lenet(ij.Tucker2(4, 5))
    model = planned_lenet(ij.Tucker2(4, 5, core=TILED))
    variables = ij.init_variables(ordinary, KEY)
    fresh = ij.init_variables(model, KEY)
    assert flat(fresh["params"]).keys() == flat(variables["params"]).keys()
    ours = {**fresh, "params": variables["params"]}
    logits, sown = model.apply(ours, x, mutable="intermediates")
    np.testing.assert_allclose(logits, ordinary.apply(variables, x), **CLOSE)
    (gates,) = sown["intermediates"]["conv2"]["core"]["gate_rate"]
    np.testing.assert_array_equal(gates, 1.0)
    # And with closed ones it is another.
    closed = jax.tree.map(lambda t: jnp.full_like(t, np.inf), ours["thresholds"])
    other = model.apply({**ours, "thresholds": closed}, x)
    assert np.abs(other - logits).max() > 1e-3


def test_an_inertial_core_is_counted_between_its_factors():
    shape = (28, 28, 1)
    model = planned_lenet(ij.Tucker2(4, 5, core=TILED))
    ordinary = ij.count_cost(planned_lenet(ij.Tucker2(4, 5)), shape)
    rows = {
        rate: next(
            row
            for row in ij.count_cost(model, shape, gate_rates={"conv2/core": rate}).rows
            if row.path == "conv2"
        )
        for rate in (0.0, 0.5, 1.0)
    }
    # 26 x 26 x 8 in, 24 x 24 x 16 out; 12 x 12 tiles of four.
    factors, core = 26 * 26 * 8 * 4 + 24 * 24 * 5 * 16, 24 * 24 * 9 * 4 * 5
    assert rows[1.0].macs == factors + core
    assert rows[0.0].macs == rows[0.0].core_macs == factors + core // 4
    # (1 + 3 rho) / 4 of the core.
    assert rows[0.5].macs == factors + core * 5 // 8
    assert rows[1.0].kind == "tucker2" and rows[1.0].ranks == (4, 5)
    dense = next(row for row in ordinary.rows if row.path == "conv2")
    assert rows[1.0].dense_macs == dense.dense_macs == 24 * 24 * 9 * 8 * 16
    assert rows[1.0].params == dense.params
    with pytest.raises(ValueError, match="'conv2', which is no inertial layer"):
        ij.count_cost(model, shape, gate_rates={"conv2": 0.5})


def test_a_core_that_stays_dense_says_why():
    plan = ij.Plan((("layer2_0/conv1", ij.Tucker2(3, 5, core=TILED)),))
    model = ij.create_model("resnet20", width=0.5, plan=plan)
    rows = {row.path: row for row in ij.count_cost(model, (32, 32, 3)).rows}
    assert rows["layer2_0/conv1"].note == "tiles need stride 1, it has 2"
    assert rows["layer2_0/conv1"].gate_rate is None


PLAN = ij.Plan(
    (
        ("conv1", ij.Tucker2(2, 3)),
        ("layer2_0/shortcut_0", ij.LowRank(2)),
        ("layer3_*", ij.Tucker2(5, 6)),
    )
)


@pytest.fixture(scope="module")
def network():
    model = ij.create_model("resnet20", width=0.5, shortcut="B", plan=PLAN)
    return model, ij.init_variables(model, KEY)


def assert_equal(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
def test_a_checkpoint_brings_back_plan_and_weights(network, tmp_path):
    model, variables = network
    ij.save_checkpoint(tmp_path / "checkpoint", model, variables)
    again, loaded = ij.load_checkpoint(tmp_path / "checkpoint")
    assert again == model and again.plan == PLAN
    assert_equal(loaded, variables)


@pytest.mark.slow
def test_pytorch_keys_are_those_of_a_sequential(network):
    model, variables = network
    state = ij.to_torch(model, variables)
    assert state["conv1.0.weight"].shape == (2, 3, 1, 1)
    assert state["conv1.1.weight"].shape == (3, 2, 3, 3)
    assert state["conv1.2.weight"].shape == (8, 3, 1, 1)
    assert state["layer2.0.shortcut.0.0.weight"].shape == (2, 8, 1, 1)
    assert state["layer2.0.shortcut.0.1.weight"].shape == (16, 2, 1, 1)
    assert_equal(ij.load_torch(model, state), variables)
    missing = {k: v for k, v in state.items() if k != "conv1.1.weight"}
    with pytest.raises(ValueError, match=r"missing conv1\.1\.weight \(3, 2, 3, 3\)"):
        ij.load_torch(model, missing)


def test_blocks_named_as_parts_keep_their_names():
    plan = ij.Plan((("layer3/left/shortcut_0", ij.LowRank(2)),))
    model = ij.create_model("simpledla", width=0.25, plan=plan)
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    keys = {k for k in ij.to_torch(model, variables) if k.startswith("layer3.left")}
    assert "layer3.left.conv1.weight" in keys
    assert "layer3.left.shortcut.0.1.weight" in keys


@pytest.mark.slow
def test_a_sequential_of_pytorch_gives_the_same():
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    model = ij.create_model("lenet", plan=ij.Plan((("conv2", ij.Tucker2(7, 9)),)))
    variables = ij.init_variables(model, KEY)
    state = ij.to_torch(model, variables)
    assert {k for k in state if k.startswith("conv2")} == {
        *("conv2.0.weight", "conv2.1.weight", "conv2.2.weight", "conv2.2.bias")
    }
    twin = torch.nn.ModuleDict(
        {
            "conv1": torch.nn.Conv2d(1, 32, 3),
            "conv2": torch.nn.Sequential(
                torch.nn.Conv2d(32, 7, 1, bias=False),
                torch.nn.Conv2d(7, 9, 3, bias=False),
                torch.nn.Conv2d(9, 64, 1),
            ),
            "fc1": torch.nn.Linear(9216, 128),
            "fc2": torch.nn.Linear(128, 10),
        }
    )
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    x = images(2, 28, 28, 1)
    with torch.no_grad():
        y = twin["conv1"](torch.from_numpy(x.transpose(0, 3, 1, 2))).relu()
        y = torch.nn.functional.max_pool2d(twin["conv2"](y).relu(), 2)
        theirs = twin["fc2"](twin["fc1"](y.flatten(1)).relu()).numpy()
    np.testing.assert_allclose(model.apply(variables, x), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "platform", "num_products"),
    [
        ("evaluated", "tpu", 2),
        ("folded", "tpu", 0),
        ("trained", "tpu", 0),
        ("folded", "cpu", 2),
    ],
)
def test_factors_are_products_on_tpus_in_evaluation_alone(kind, platform, num_products):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            # A core of this size is not joined with its last factor.
            x = ij.Tucker2Conv(32, 3, 20, 20, name="conv")(x, train=train)
            return nn.BatchNorm(use_running_average=not train)(x)

    model, x = Network(), jnp.ones((2, 8, 8, 32))
    variables = model.init(KEY, x)
    expected = model.apply(variables, x)
    if kind == "folded":
        model, variables = ij.fold_batch_norm(model, variables, image_shape=(8, 8, 32))
        np.testing.assert_allclose(model.apply(variables, x), expected, atol=1e-6)
    options = {"train": True, "mutable": ["batch_stats"]} if kind == "trained" else {}
    function = jax.jit(lambda variables, x: model.apply(variables, x, **options))
    exported = jax.export.export(function, platforms=[platform])(variables, x)
    assert exported.mlir_module().count("stablehlo.dot_general") == num_products


def test_one_number_is_the_side_of_a_square_whatever_its_type(no_shape_checks):
    x = np.ones((1, 6, 6, 3), np.float32)
    for size in (3, np.int64(3), (3, 3), np.array([3, 3])):
        layer = ij.Tucker2Conv(4, size, rank_in=1, rank_out=2)
        assert layer.init(jax.random.key(0), x)["params"]["core"]["kernel"].ndim == 4
    for size in (1, np.int64(1), [1, 1]):
        layer = ij.LowRankConv(4, rank=2, kernel_size=size)
        assert layer.init(jax.random.key(0), x)["params"]["left"]["kernel"].ndim == 4
    line = ij.LowRankConv(4, rank=2, kernel_size=(1,))
    assert line.init(jax.random.key(0), x[0])["params"]["left"]["kernel"].ndim == 3


def test_a_threshold_may_be_a_number_of_python():
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype(np.float32)
    layer = ij.InertialConv(4, 3, reading="tiled")
    variables = layer.init(jax.random.key(0), x)
    arrays = {**variables, "thresholds": {"threshold": jnp.float32(0.5)}}
    numbers = {**variables, "thresholds": {"threshold": 0.5}}
    np.testing.assert_array_equal(layer.apply(numbers, x), layer.apply(arrays, x))
