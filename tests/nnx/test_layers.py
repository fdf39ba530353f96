"""NNX layers beside those of Linen: outputs, training, and their place in a plan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from nnx_networks import SHAPE, X

import inertia_jax as ij

RNGS = nnx.Rngs(0)
TILED = {"reading": "tiled", "threshold": ij.Rate(0.5)}
PAIRS = {
    "tucker2": (
        ij.nnx.Tucker2Conv(4, 6, (3, 3), 2, rank_in=2, rank_out=3, rngs=RNGS),
        ij.Tucker2Conv(6, (3, 3), 2, 3, strides=2),
    ),
    "low_rank": (
        ij.nnx.LowRankConv(4, 6, 2, rank=2, rngs=RNGS),
        ij.LowRankConv(6, 2, strides=2),
    ),
    "dense": (
        ij.nnx.LowRankDense(4, 6, rank=2, rngs=RNGS),
        ij.LowRankDense(6, 2),
    ),
    "inertial": (
        ij.nnx.InertialConv(4, 6, (3, 3), rngs=RNGS, **TILED),
        ij.InertialConv(6, (3, 3), **TILED),
    ),
    "window": (
        ij.nnx.InertialConv(4, 6, 1, 3, 2, padding="VALID", relative=True, rngs=RNGS),
        ij.InertialConv(6, 1, 3, strides=2, padding="VALID", relative=True),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_computes_what_that_of_linen_does(name):
    layer, linen = PAIRS[name]
    variables = jax.jit(linen.init)(jax.random.key(1), X)
    layer = nnx.clone(layer)
    for path, leaf in nnx.iter_graph(layer):
        if isinstance(leaf, nnx.Variable):
            trees = [t for c, t in variables.items() if c != "intermediates"]
            for key in path:
                trees = [t[key] for t in trees if key in t]
            leaf[...] = trees[0]
    layer.train()
    call = {} if name in ("low_rank", "dense") else {"train": True}
    expected, changed = linen.apply(
        variables, X, mutable=["batch_stats", "thresholds"], **call
    )
    np.testing.assert_allclose(layer(X), expected, atol=1e-6)
    # Running means have moved as in Linen.
    for tree in changed.values():
        for key, value in tree.items():
            np.testing.assert_allclose(getattr(layer, key)[...], value, atol=1e-6)
    layer.eval()
    evaluated = linen.apply({**variables, **changed}, X)
    np.testing.assert_allclose(layer(X), evaluated, atol=1e-6)


class Small(nnx.Module):
    def __init__(self, rngs):
        spec = ij.Inertial(3, 5, threshold=ij.Learned(0.5), gate_gradient="ste")
        self.conv = ij.nnx.Tucker2Conv(
            4, 8, (3, 3), rank_in=2, rank_out=4, core=spec, rngs=rngs
        )
        self.inertial = ij.nnx.InertialConv(8, 8, (3, 3), rngs=rngs, **TILED)
        self.fc = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.inertial(self.conv(x))).mean((1, 2)))


@nnx.jit
def train_step(net, optimizer, images):
    def loss(net):
        return (net(images) ** 2).sum()

    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value


@pytest.mark.slow
def test_layers_are_trained_by_optimizers_and_kept_by_orbax(tmp_path):
    net = Small(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.sgd(0.01), wrt=nnx.Param)
    before = nnx.clone(net)
    losses = [float(train_step(net, optimizer, X)) for _ in range(3)]
    assert losses[2] < losses[0]
    for path in ("conv.core.threshold", "conv.u_in.kernel", "inertial.threshold"):
        first, last = before, net
        for name in path.split("."):
            first, last = getattr(first, name), getattr(last, name)
        assert np.abs(first[...] - last[...]).max() > 0, path
    assert isinstance(net.conv.core.threshold, nnx.Param)
    assert isinstance(net.inertial.threshold, ij.nnx.GateThreshold)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", nnx.state(net))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(lambda: Small(nnx.Rngs(1)))
        graphdef, shapes = nnx.split(abstract)
        state = checkpointer.restore(tmp_path / "net", shapes)
    restored = nnx.merge(graphdef, state)
    restored.eval()
    net.eval()
    np.testing.assert_array_equal(restored(X), net(X))


def test_an_inertial_layer_sows_its_gate_rates():
    layer = nnx.clone(PAIRS["inertial"][0])
    layer.eval()
    _, sown = nnx.capture(layer, nnx.Intermediate)(X)
    (rates,) = sown["gate_rate"].get_value()
    assert rates.shape == (len(X),)


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match=r"`rank_in` \(=5\) must be in \[1, 4\]"):
        ij.nnx.Tucker2Conv(4, 6, (3, 3), rank_in=5, rank_out=3, rngs=RNGS)
    with pytest.raises(ValueError, match=r"`rank` \(=5\)"):
        ij.nnx.LowRankDense(4, 6, rank=5, rngs=RNGS)
    with pytest.raises(ValueError, match="must be square"):
        ij.nnx.InertialConv(4, 6, (3, 5), rngs=RNGS)
    with pytest.raises(ValueError, match=r"`strides` \(=2\) must be 1"):
        ij.nnx.InertialConv(4, 6, (3, 3), strides=2, rngs=RNGS, reading="tiled")


@pytest.mark.slow
def test_a_plan_is_read_off_a_module_and_applied_to_another():
    net = Small(nnx.Rngs(0))
    plan = ij.Plan.from_json(ij.nnx.plan_of(net).to_json())
    assert [spec for _, spec in plan.rules] == [net.conv.spec, net.inertial.spec]
    assert ij.count_cost(net, SHAPE).rows[1].kind == "inertial"

    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
            self.inertial = nnx.Conv(8, 8, (3, 3), rngs=rngs)
            self.fc = nnx.Linear(8, 10, rngs=rngs)

        __call__ = Small.__call__

    plain = Plain(nnx.Rngs(3))
    made = ij.nnx.apply_plan(plain, plan)
    assert type(made) is Plain and type(plain.conv) is nnx.Conv
    nnx.update(made, nnx.state(net))
    made.eval()
    net.eval()
    np.testing.assert_array_equal(made(X), net(X))
    with pytest.raises(ValueError, match="'cnv', which matches no convolution"):
        ij.nnx.apply_plan(plain, ij.Plan((("cnv", ij.Tucker2(1, 1)),)))
    with pytest.raises(ValueError, match=r"LowRank.* at 'conv', which has filters"):
        ij.nnx.apply_plan(plain, ij.Plan((("conv", ij.LowRank(1)),)))
    linear = ij.nnx.apply_plan(plain, ij.Plan((("fc", ij.LowRank(2)),)))
    assert isinstance(linear.fc, ij.nnx.LowRankDense)
    assert linear.fc.right.bias.shape == jnp.shape(plain.fc.bias)


def test_rules_that_stand_nowhere_in_a_module_are_warned_of():
    class Plain(nnx.Module):
        def __init__(self):
            self.strided = nnx.Conv(4, 8, (3, 3), strides=2, rngs=RNGS)
            self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=RNGS)
            self.conv = nnx.Conv(8, 8, (3, 3), rngs=RNGS)
            self.fc = nnx.Linear(8, 10, rngs=RNGS)

        def __call__(self, x):
            return self.fc(self.conv(self.grouped(self.strided(x))).mean((1, 2)))

    tiled = ij.Inertial(3, 4, reading="tiled")
    with pytest.warns(UserWarning, match="does not stand everywhere") as warned:
        made = ij.nnx.apply_plan(Plain(), ij.Plan((("*", tiled),)))
    text = str(warned[0].message)
    assert "strided stays dense: tiles need stride 1" in text
    assert "grouped stays dense: has 2 groups" in text and "fc" not in text
    assert [glob for glob, _ in ij.nnx.plan_of(made).rules] == ["conv"]
    with pytest.warns(UserWarning, match="fc stays dense: is an nn.Dense, of which"):
        ij.nnx.apply_plan(Plain(), ij.Plan((("fc", ij.Tucker2(1, 1)),)))
    assert ij.dropped_rules(made, SHAPE) == ()


@pytest.mark.slow
def test_networks_of_the_library_are_modules_too():
    net = ij.nnx.create_model("lenet", width=0.125, rngs=nnx.Rngs(0))
    images = np.ones((2, 28, 28, 1), np.float32)
    assert np.abs(net(images) - net(images)).max() > 0  # dropout, in training mode
    net.eval()
    np.testing.assert_array_equal(net(images), net(images))
    small = ij.compress(net, ranks=ij.Ratio(0.5))
    assert type(small) is ij.nnx.Network
    assert ij.count_cost(small, (28, 28, 1)).macs < ij.count_cost(net, (28, 28, 1)).macs
    np.testing.assert_allclose(ij.decompress(small)(images), small(images), atol=1e-5)
    plan = ij.nnx.plan_of(small)
    assert plan.rules and ij.nnx.plan_of(net) == ij.Plan()
    made = ij.nnx.apply_plan(ij.nnx.create_model("lenet", width=0.125, rngs=RNGS), plan)
    assert type(made) is ij.nnx.Network and ij.nnx.plan_of(made) == plan
    nnx.update(made, nnx.state(small, nnx.Param))
    made.eval()
    np.testing.assert_array_equal(made(images), small(images))
    with pytest.raises(ValueError, match="'conv9', which matches no convolution"):
        ij.nnx.apply_plan(net, ij.Plan((("conv9", ij.Tucker2(1, 1)),)))
    other = nnx.bridge.ToNNX(nn.Conv(3, (3, 3)), rngs=nnx.Rngs(0)).lazy_init(images)
    with pytest.raises(ValueError, match="holds a Conv of Linen; must be a network"):
        ij.nnx.apply_plan(other, plan)


def test_initialisers_with_metadata_are_those_of_flax():
    names = (None, None, None, "model")
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=auto)):
        like = nnx.Conv(4, 4, (3, 3), kernel_init=init, rngs=nnx.Rngs(0))
        layer = ij.nnx.InertialConv(
            4, 4, 3, reading="tiled", kernel_init=init, rngs=nnx.Rngs(0)
        )
    assert layer.kernel.get_metadata() == like.kernel.get_metadata()
    plain = ij.nnx.InertialConv(4, 4, 3, reading="tiled", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])
