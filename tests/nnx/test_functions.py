"""The functions of the library on NNX modules, beside the same on Linen models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_networks import (
    SHAPE,
    Block,
    LinenNet,
    Net,
    X,
    linen_variables,
    make_pair,
)

import inertia_jax as ij

RULES = (("block/*", ij.Tucker2(4, 4)), ("point", ij.LowRank(4)))
HALF = {"ranks": ij.Plan(RULES), "calibration": X, "batch_size": 8}


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.fixture(scope="module")
def halves(pair):
    """The network compressed in NNX, and (model, variables) compressed in Linen."""
    net, (model, variables) = pair
    return ij.compress(net, **HALF), ij.compress(model, variables, **HALF)


def assert_same_variables(module, variables, tolerance=1e-6):
    """The parameters and statistics of a module are those of Linen's variables."""
    found = linen_variables(module)
    assert jax.tree.structure(found) == jax.tree.structure(
        {name: dict(variables[name]) for name in found}
    )
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_compression_is_that_of_the_same_network_in_linen(pair, halves):
    net, _ = pair
    small, (model, variables) = halves
    assert type(small) is Net and type(small.block) is Block
    assert type(net.stem) is nnx.Conv  # the network itself is not changed
    assert dict(ij.nnx.plan_of(small).rules) == dict(model.plan.rules)
    assert isinstance(small.block.conv2, ij.nnx.Tucker2Conv)
    assert isinstance(small.point, ij.nnx.LowRankConv)
    assert type(small.stem) is nnx.Conv
    assert_same_variables(small, variables)
    np.testing.assert_allclose(small(X), model.apply(variables, X), atol=1e-6)


def test_costs_are_those_of_the_same_network_in_linen(pair, halves):
    for module, (model, _) in (pair, halves):
        rows = [
            {row.path: row for row in ij.count_cost(network, SHAPE).rows}
            for network in (module, model)
        ]
        assert rows[0] == rows[1]


@pytest.mark.slow
def test_factors_are_multiplied_out_again(halves):
    small, _ = halves
    dense = ij.decompress(small, image_shape=SHAPE)
    assert type(dense.stem) is nnx.Conv and ij.nnx.plan_of(dense) == ij.Plan()
    np.testing.assert_allclose(dense(X), small(X), atol=1e-5)
    again = ij.compress(small, ranks=ij.Ratio(0.25), image_shape=SHAPE)
    assert again.block.conv1.spec == ij.Tucker2(2, 2)


def test_batch_norm_is_recalibrated_as_in_linen(halves):
    small, (model, variables) = halves
    measured = ij.recalibrate_batch_norm(small, X, batch_size=8)
    expected = ij.recalibrate_batch_norm(model, variables, X, batch_size=8)
    assert np.abs(measured.block.bn1.mean - small.block.bn1.mean).max() > 0.01
    assert_same_variables(measured, expected)


@pytest.mark.slow
def test_reconstruction_is_that_of_linen(pair, halves):
    net, dense = pair
    small, (model, variables) = halves
    options = {"images": X, "layers": "block/conv1", "iterations": 2}
    fitted = ij.reconstruct(small, dense=net, **options)
    expected = ij.reconstruct(model, variables, dense=dense, **options)
    states = [
        jax.tree.leaves(nnx.state(module, nnx.Param)) for module in (fitted, small)
    ]
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*states, strict=True))
    # Steps of conjugate gradients, of sums in another order.
    assert_same_variables(fitted, expected, tolerance=1e-4)


def test_batch_norm_is_folded_into_kernels(halves):
    small, _ = halves
    folded = ij.fold_batch_norm(small, image_shape=SHAPE)
    assert not nnx.state(folded, nnx.BatchStat)
    np.testing.assert_allclose(folded(X), small(X), atol=1e-5)
    folded.train()
    with pytest.raises(ValueError, match=r"`use_running_average` \(=False\) must be"):
        folded(X)
    assert np.isfinite(small(X)).all()  # which has its BatchNorm still


def test_a_module_is_exported_in_evaluation_mode(halves, tmp_path):
    small, _ = halves
    trained = nnx.clone(small)
    trained.train()
    ij.save_exported(tmp_path / "net", trained, image_shape=SHAPE, platforms=("cpu",))
    found = ij.load_exported(tmp_path / "net")(X)
    np.testing.assert_allclose(found, small(X), atol=1e-6)


def test_a_module_is_saved_as_a_linen_model_alone(tmp_path, no_shape_checks):
    net = Told(nnx.Rngs(0))
    small = ij.compress(net, ranks=ij.Ratio(0.5), image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"must be a Linen model.*ij.nnx.as_linen\("):
        ij.save_checkpoint(tmp_path / "net", small, {})
    ij.save_checkpoint(tmp_path / "net", *ij.nnx.as_linen(small))
    view, _ = ij.nnx.as_linen(net)
    again = ij.load_checkpoint(tmp_path / "net", model=view, image_shape=SHAPE)
    back = ij.nnx.from_linen(net, *again[:2])
    assert ij.nnx.plan_of(back) == ij.nnx.plan_of(small)
    np.testing.assert_array_equal(back(X), small(X))


class TwoInputs(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, images, scale):
        return {"logits": self.conv(images).mean((1, 2)) * scale}


class Named(nnx.Module):
    def __init__(self):
        self.net = Told(nnx.Rngs(0))

    def __call__(self, inputs, train=False):
        return self.net(inputs["image"], train)


def test_a_module_takes_inputs_by_name():
    net = Named()
    measured = ij.recalibrate_batch_norm(net, {"image": X}, batch_size=8)
    expected = ij.recalibrate_batch_norm(net.net, X, batch_size=8)
    np.testing.assert_allclose(
        measured.net.bn.mean[...], expected.bn.mean[...], atol=1e-6
    )
    assert np.abs(measured.net.bn.mean[...]).max() > 0.01
    for state in (nnx.state(net), {"params": {}, "batch_stats": {}}, {}):
        with pytest.raises(ValueError, match="`variables` must be left out"):
            ij.recalibrate_batch_norm(net, state, {"image": X})


def test_a_module_is_called_as_apply_fn_says():
    def apply_fn(module, images, train):
        assert isinstance(module, TwoInputs)
        return module(images, jnp.float32(2))["logits"]

    net, half = TwoInputs(), ij.Ratio(0.5)
    small = ij.compress(net, ranks=half, calibration=X, apply_fn=apply_fn)
    assert small.conv.spec == ij.Tucker2(2, 4)
    with pytest.raises(ValueError, match="TwoInputs cannot be called.*scale"):
        ij.compress(net, ranks=half, image_shape=SHAPE)


class Told(nnx.Module):
    """A network that tells BatchNorm at its call which statistics to use."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), rngs=rngs)

    def __call__(self, images, train=False):
        x = self.bn(self.conv1(images), use_running_average=not train)
        return self.conv2(nnx.relu(x)).mean((1, 2))


def test_a_module_may_tell_batch_norm_at_its_call_that_it_is_trained():
    net = Told(nnx.Rngs(0))
    small = ij.compress(net, ranks=ij.Ratio(0.5), calibration=X, batch_size=8)
    assert small.conv2.spec == ij.Tucker2(4, 4)
    measured = ij.recalibrate_batch_norm(small, X, batch_size=len(X))
    x = small.conv1(X)
    np.testing.assert_allclose(measured.bn.mean[...], x.mean((0, 1, 2)), atol=1e-5)
    assert np.abs(measured.bn.mean[...]).max() > 0.01
    folded = ij.fold_batch_norm(measured, image_shape=SHAPE)
    assert not nnx.state(folded, nnx.BatchStat)
    np.testing.assert_allclose(folded(X), measured(X), atol=1e-5)


def test_bad_modules_are_refused(pair):
    net, (_, variables) = pair
    half = {"ranks": ij.Ratio(0.5), "image_shape": SHAPE}
    with pytest.raises(ValueError, match="`variables` must be left out"):
        ij.compress(net, variables, **half)
    with pytest.raises(ValueError, match="`variables` must be left out"):
        ij.compress(net, variables=nnx.state(net), **half)
    with pytest.raises(ValueError, match=r"`module` \(=Net\) is abstract"):
        ij.compress(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), **half)
    with pytest.raises(
        ValueError, match="Net cannot be called on images .* must have 4 channels"
    ):
        ij.count_cost(net, (8, 8, 5))
    with pytest.raises(ValueError, match=r"`image_shape` \(=None\).* Net, which"):
        ij.compress(net, ranks=ij.Ratio(0.5))
    model, own = ij.nnx.as_linen(net)
    with pytest.raises(ValueError, match="do not belong to `model`: .*drop.* missing"):
        ij.nnx.from_linen(net, model, variables)
    other = {**own, "params": {**own["params"], "stem": own["params"]["point"]}}
    with pytest.raises(ValueError, match="stem/bias is .16,., must be .8,."):
        ij.nnx.from_linen(net, model, other)


class Keyed(nnx.Module):
    """It draws in evaluation, too: from a stream that it is given, or its own."""

    def __init__(self, stream=None):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))
        self.stream = stream

    def __call__(self, x, rngs):
        noise = jax.random.normal((self.stream or rngs)(), x.shape)
        return self.conv(x + noise).mean((1, 2))


def test_a_module_may_need_a_key_in_evaluation():
    half = {"ranks": ij.Ratio(0.5), "image_shape": SHAPE}
    net = Keyed()
    with pytest.raises(ValueError, match="missing 1 .*'rngs'.* say how it is called"):
        ij.compress(net, **half)
    call = lambda net, images, train: net(images, nnx.Rngs(1))  # noqa: E731
    small = ij.compress(net, apply_fn=call, **half)
    assert small.conv.spec == ij.Tucker2(2, 4)
    call = lambda net, images, train: net(images, None)  # noqa: E731
    drawing = ij.compress(Keyed(nnx.Rngs(1)), apply_fn=call, **half)
    np.testing.assert_allclose(small(X, nnx.Rngs(1)), drawing(X, None), atol=1e-6)


TILED = ij.Inertial(3, 4, reading="tiled", threshold=ij.Learned(0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    (
        ij.Tucker2(4, 4),
        ij.LowRank(4),
        dataclasses.replace(TILED, gate_gradient="ste", capacities=None),
        dataclasses.replace(TILED, threshold=ij.Rate(0.5), relative=True),
    ),
    ids=("tucker2", "low_rank", "learned", "rate"),
)
def test_a_step_is_that_of_the_same_network_in_linen(spec):
    where = "point" if isinstance(spec, ij.LowRank) else "block/*"
    net = ij.nnx.apply_plan(Net(nnx.Rngs(0)), ij.Plan(((where, spec),)))
    net.drop.rate = 0.0
    model = ij.Planned(LinenNet(drop_rate=0.0), ij.nnx.plan_of(net))
    _, variables = ij.nnx.as_linen(net)
    params = variables["params"]
    others = {n: variables[n] for n in ("batch_stats", "thresholds") if n in variables}

    def loss(params):
        given = {"params": params, **others}
        y, changed = model.apply(given, X, train=True, mutable=[*others])
        return (y**2).mean(), (y, changed)

    (_, (y, changed)), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params
    )

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def step(net, images):
        y = net(images)
        return (y**2).mean(), y

    net.train()
    (_, ours), grads = step(net, X)
    np.testing.assert_allclose(ours, y, atol=1e-6)
    _, moved = ij.nnx.as_linen(net)
    for found, wanted in (
        (nnx.to_pure_dict(grads), expected),
        ({name: moved[name] for name in others}, dict(changed)),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))


@pytest.mark.slow
def test_a_module_is_made_inertial_as_in_linen(pair):
    net, (model, variables) = pair
    options = {"macs": 0.9, "calibration": X, "batch_size": 8}
    ours = ij.make_inertial(net, **options)
    theirs, changed = ij.make_inertial(model, variables, **options)
    assert dict(ij.nnx.plan_of(ours).rules) == dict(theirs.plan.rules)
    assert any(isinstance(n, ij.nnx.InertialConv) for _, n in nnx.iter_graph(ours))
    np.testing.assert_allclose(ours(X), theirs.apply(changed, X), atol=1e-6)
