"""Inertial convolutions in other people's networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from inertia_jax.calls import apply_network

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

conv = functools.partial(nn.Conv, 4, (3, 3))
tiled = functools.partial(ij.Inertial, reading="tiled", threshold=ij.Fixed.OPEN)


class Branches(nn.Module):
    """Convolutions of the same image, each with options of its own."""

    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        default = {"features": 4, "kernel_size": (3, 3)}
        return [nn.Conv(**{**default, **dict(o)})(x) for o in self.options]


PADDINGS = ("SAME", "CIRCULAR", "REFLECT", ((0, 1), (2, 0)))


def branches(*options):
    return Branches(tuple(tuple(sorted(each.items())) for each in options))


def drawn(model, x=X, **call):
    return jax.jit(functools.partial(model.init, **call))(KEY, x)


def called(model, variables, x=X):
    return jax.jit(model.apply)(variables, x)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [tiled(3, 4), ij.Tucker2(2, 3, core=tiled(3, 5))])
def test_open_tiles_are_the_ordinary_convolution_at_any_padding(spec):
    dense = branches(*({"padding": padding} for padding in PADDINGS))
    if isinstance(spec, ij.Tucker2):
        plan = ij.Plan((("*", ij.Tucker2(spec.rank_in, spec.rank_out)),))
        dense = ij.Planned(dense, plan)
    model = ij.Planned(
        branches(*({"padding": p} for p in PADDINGS)), ij.Plan((("*", spec),))
    )
    variables = drawn(model)
    params = {"params": variables["params"]}
    expected = called(dense, params, X)
    for y, want in zip(called(model, variables, X), expected, strict=True):
        # Float32 sums of 27 products in another order.
        np.testing.assert_allclose(y, want, atol=3e-6)


@pytest.mark.slow
def test_small_cores_and_regions_keep_the_output_grid():
    """With every gate closed the window reading is the core at the region's middle."""
    spec = ij.Inertial(1, 5, threshold=ij.Fixed.CLOSED)
    options = [
        {"padding": padding, "strides": strides, "kernel_size": size}
        for padding in PADDINGS
        for strides, size in ((2, (3, 3)), ((1, 2), (3, 5)))
    ]
    dense = branches(*options)
    model = ij.Planned(dense, ij.Plan((("*", spec),)))
    variables = drawn(model)
    middles = {}
    for i, each in enumerate(options):
        layer = variables["params"][f"Conv_{i}"]
        kh, kw = each["kernel_size"]
        kernel = np.zeros((kh, kw, 3, 4), np.float32)
        kernel[kh // 2, kw // 2] = layer["kernel"][0, 0]
        middles[f"Conv_{i}"] = {**layer, "kernel": kernel}
    expected = called(dense, {"params": middles}, X)
    for y, want in zip(called(model, variables, X), expected, strict=True):
        np.testing.assert_allclose(y, want, atol=1e-6)


class ByTrain(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        return conv(name="conv")(x)


class ByDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return conv(name="conv")(x)


class ByField(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return conv(name="conv")(x)


class ByNothing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return conv(name="conv")(x)


RATE = ij.Plan((("conv", tiled(3, 4, threshold=ij.Rate(0.5))),))


def trained_inside(model, x):
    with model.inside(train=True) as network:
        return network(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "evaluate", "train"),
    [
        (ByTrain(), {"train": False}, {"train": True}),
        (ByTrain(), {"train": np.False_}, {"train": np.True_}),
        (ByDeterministic(), {}, {"deterministic": False}),
        (ByNothing(), {}, {"train": True}),
        (ByNothing(), {}, {"train": np.True_}),
        (ByNothing(), {"train": False}, {"method": trained_inside}),
    ],
)
def test_a_call_says_whether_inertial_layers_are_trained(model, evaluate, train):
    model = ij.Planned(model, RATE)
    variables = drawn(model, **evaluate)
    moved = {}
    for name, call in (("evaluate", evaluate), ("train", train)):
        _, changed = model.apply(variables, X, **call, mutable=["thresholds"])
        moved[name] = float(changed["thresholds"]["conv"]["threshold"])
    # It starts at 0, and a tenth of the batch's median friction is added.
    assert moved["evaluate"] == 0 < moved["train"]


def test_a_field_of_the_network_or_apply_fn_says_so_too():
    model = ij.Planned(ByField(), RATE)
    variables = drawn(model)
    trained = ij.Planned(ByField(train=True), RATE)
    _, changed = trained.apply(variables, X, mutable=["thresholds"])
    threshold = changed["thresholds"]["conv"]["threshold"]
    for network in (model, ij.Planned(ByNothing(), RATE)):
        _, again = apply_network(
            network, variables, X, train=True, apply_fn=lambda m, x, train: m(x)
        )
        assert again["thresholds"]["conv"]["threshold"] == threshold > 0


@pytest.mark.slow
def test_layers_that_cannot_be_inertial_stay_dense_and_are_listed():
    class Mine(nn.Conv):
        pass

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = conv(name="plain")(x)
            x = conv(name="grouped", feature_group_count=2)(x)
            x = conv(name="dilated", kernel_dilation=2)(x)
            x = conv(name="masked", mask=jnp.ones((3, 3, 4, 4)))(x)
            x = conv(name="strided", strides=(1, 2))(x)
            x = nn.Conv(4, (3, 1), name="flat")(x)
            x = conv(name="exact", precision="highest")(x)
            x = Mine(4, (3, 3), name="mine")(x)
            return nn.Conv(4, (3,), name="rows")(x.mean(1))

    plain = drawn(Net())
    model = ij.Planned(Net(), ij.Plan((("*", tiled(3, 4)),)))
    reasons = {rule.path: rule.reason for rule in ij.dropped_rules(model, X.shape[1:])}
    assert reasons == {
        "grouped": "has 2 groups",
        "dilated": "has kernel_dilation 2",
        "masked": "has a mask",
        "strided": "tiles need stride 1, it has 2",
        "flat": "core 3 exceeds kernel 1",
        "exact": "has precision highest",
        "mine": "is a Mine, which may compute anything",
        "rows": "is not two-dimensional",
    }
    rows = {row.path: row for row in ij.count_cost(model, X.shape[1:]).rows}
    assert {path for path, row in rows.items() if row.kind == "inertial"} == {"plain"}
    assert {path: row.note for path, row in rows.items() if row.note} == reasons
    variables = {**plain, "thresholds": drawn(model)["thresholds"]}
    np.testing.assert_allclose(
        called(model, variables, X), called(Net(), plain, X), atol=1e-5
    )


def test_a_factorised_layer_keeps_an_ordinary_core_where_no_other_stands():
    core = ij.Tucker2(2, 2, core=tiled(3, 4))
    model = ij.Planned(branches({"strides": 2}, {}), ij.Plan((("*", core),)))
    assert [rule.path for rule in ij.dropped_rules(model, X.shape[1:])] == ["Conv_0"]
    rows = {row.path: row for row in ij.count_cost(model, X.shape[1:]).rows}
    assert rows["Conv_0"].gate_rate is None and rows["Conv_1"].gate_rate == 1


class Foreign(nn.Module):
    """BatchNorm, a convolution that is called twice, one that is recomputed, a head."""

    classes: int = 5

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(x))
        twice = nn.Conv(8, (3, 3), padding="CIRCULAR", name="twice")
        x = twice(nn.relu(twice(x)))
        self.sow("intermediates", "gate_rate", x.mean())
        x = nn.remat(nn.Conv)(8, (3, 3), name="again")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


@pytest.mark.slow
def test_the_convolutions_of_any_model_are_made_inertial():
    variables = drawn(Foreign())
    options = {"macs": 0.8, "calibration": X, "layers": "[!s]*"}
    model, changed = ij.make_inertial(Foreign(), variables, **options)
    assert isinstance(model, ij.Planned)
    specs = dict(model.plan.rules)
    assert set(specs) == {"twice", "again"} == set(changed["thresholds"])
    assert dict(model.kept) == {"depthwise": "has 8 groups"}
    # Batch statistics, as in training, measured the rates that the plan has.
    still = model.clone(plan=model.plan.with_fixed_thresholds())
    _, seen = apply_network(still, changed, X, train=True, mutable=["intermediates"])
    sown = traverse_util.flatten_dict(seen["intermediates"], sep="/")
    measured = {p: float(np.mean(sown[f"{p}/gate_rate"])) for p in specs}
    for path, spec in specs.items():
        np.testing.assert_allclose(measured[path], spec.threshold.target, atol=1e-6)
    shape = X.shape[1:]
    cost = ij.count_cost(
        model, shape, gate_rates={p: float(r) for p, r in measured.items()}
    )
    assert cost.total_macs <= 0.8 * ij.count_cost(Foreign(), shape).macs
    before = variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert not np.allclose(changed["batch_stats"]["BatchNorm_0"]["mean"], before)


def test_a_model_that_cannot_be_trained_is_made_inertial():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(conv()(x))
            return nn.Dense(5)(x.mean((1, 2)))

    variables = drawn(Bare())
    model, changed = ij.make_inertial(Bare(), variables, macs=0.9, calibration=X)
    assert [glob for glob, _ in model.plan.rules] == ["Conv_0"]
    jax.tree.map(
        np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"]
    )


@pytest.mark.slow
def test_compressed_models_are_made_inertial_where_they_are_dense():
    variables = drawn(Foreign())
    small = ij.compress(
        Foreign(),
        variables,
        ranks=ij.Ratio(0.5),
        layers="again",
        image_shape=X.shape[1:],
    )
    model, changed = ij.make_inertial(*small, macs=0.9, calibration=X, layers="t*")
    assert isinstance(model, ij.Planned) and model.unplanned == Foreign()
    kinds = {glob: type(spec) for glob, spec in model.plan.rules}
    assert kinds == {"twice": ij.Inertial, "again": ij.Tucker2}
    assert np.isfinite(called(model, changed, X)).all()


def test_bad_input_to_make_inertial_names_the_reasons():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), strides=2)(x).mean((1, 2))

    make = functools.partial(ij.make_inertial, macs=0.9, calibration=X)
    with pytest.raises(ValueError, match="'Conv_0' tiles need stride 1"):
        make(Deep(), drawn(Deep()))
    with pytest.raises(ValueError, match="`variables` do not belong to `model`"):
        make(Foreign(), drawn(Deep()))


def test_rules_for_layers_that_stay_whatever_they_are_are_dropped():
    class Own(nn.Conv):
        pass

    class Others(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Own(4, (3, 3), name="own")(nn.Conv(4, (3, 3), name="conv")(x))
            x = nn.ConvTranspose(4, (3, 3), name="up")(x)
            return nn.Dense(4, name="fc")(x.mean((1, 2)))

    def reasons(*rules):
        model = ij.Planned(Others(), ij.Plan(rules))
        found = ij.dropped_rules(model, (8, 8, 3))
        assert {rule.path for rule in found} == {
            row.path for row in ij.count_cost(model, (8, 8, 3)).rows if row.note
        }
        return {rule.path: rule.reason for rule in found}

    up = "is an nn.ConvTranspose, of which there is no"
    own = "is a Own, which may compute anything"
    everywhere = reasons(("*", ij.Tucker2(2, 2)))
    assert everywhere == {"own": own, "up": f"{up} factorised form"}
    assert reasons(("fc", ij.Tucker2(2, 2))) == {
        "fc": "is an nn.Dense, of which there is no Tucker-2 form"
    }
    tiled = ij.Inertial(3, 4, reading="tiled")
    assert reasons(("up", tiled)) == {"up": f"{up} inertial form"}
    assert reasons(("fc", ij.LowRank(2)), ("*", ij.Conv())) == {}


def test_a_kernel_of_the_same_shape_is_drawn_as_the_model_draws_it():
    ones = nn.initializers.ones_init()
    model = nn.Sequential([nn.Conv(4, (3, 3), kernel_init=ones)])
    x = np.ones((1, 6, 6, 2), np.float32)

    def kernel(core_size, region_size):
        spec = ij.Inertial(core_size, region_size)
        planned = ij.Planned(model, ij.Plan((("layers_0", spec),)))
        return planned.init(jax.random.key(0), x)["params"]["layers_0"]["kernel"]

    np.testing.assert_array_equal(kernel(3, 5), 1)
    # The model's initialiser may know the shape of its own kernel alone.
    assert len(np.unique(kernel(1, 3))) > 1
