"""Modules of every make: where layers are, which stay, and what a call changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import inertia_jax as ij

SHAPE = (6, 6, 4)
X = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)


def conv(seed=0, **options):
    return nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(seed), **options)


class Places(nnx.Module):
    def __init__(self):
        self.listed = nnx.List([conv(1), conv(2)])
        self.named = nnx.Dict(a=conv(3))
        self.both = nnx.data((conv(4), {"q": conv(5)}))
        self.again = self.listed[0]

    def __call__(self, x):
        for layer in (*self.listed, self.named["a"], self.both[0], self.again):
            x = layer(x)
        return self.both[1]["q"](x)


def test_layers_are_replaced_wherever_they_are_and_shared_ones_stay_one():
    net = Places()
    rules = ("listed/*", "named/a", "both/*", "again")
    # `again` comes first in the module, so that it is the name of the shared layer.
    plan = ij.Plan(tuple((glob, ij.Tucker2(3, 3)) for glob in rules if glob != "again"))
    full = ij.Plan((("*", ij.Tucker2(4, 4)),))
    small = ij.compress(net, ranks=full, image_shape=SHAPE)
    assert len(ij.nnx.plan_of(small).rules) == 5
    assert small.again is small.listed[0] and small.again is not net.again
    assert type(small.both[1]["q"]) is ij.nnx.Tucker2Conv
    np.testing.assert_allclose(small(X), net(X), atol=1e-5)
    made = ij.nnx.apply_plan(net, plan)
    assert made.both[0].spec == ij.Tucker2(3, 3)


class Doubled(nnx.Conv):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Stays(nnx.Module):
    """An ordinary convolution, and layers that nothing can take the place of."""

    def __init__(self):
        self.plain = conv()
        self.doubled = Doubled(4, 4, (3, 3), rngs=nnx.Rngs(1))
        self.tied, self.other = conv(2), conv(3)
        self.other.kernel = self.tied.kernel
        self.masked = conv(6, mask=jnp.ones((3, 3, 4, 4)))
        self.normalised = nnx.WeightNorm(conv(7), rngs=nnx.Rngs(8))

    def __call__(self, x):
        x = self.other(self.tied(self.doubled(self.plain(x))))
        return self.normalised(self.masked(x))


def test_other_layers_stay_and_the_reasons_are_said():
    net = Stays()
    model, variables = ij.nnx.as_linen(net)
    np.testing.assert_allclose(model.apply(variables, X), net(X), atol=1e-6)
    options = {"ranks": ij.Ratio(1.0), "only_cheaper": False, "image_shape": SHAPE}
    kept = dict(ij.compress(model, variables, **options)[0].kept)
    assert kept["doubled"] == "is a Doubled, which may compute anything"
    assert kept["masked"] == "has a mask"
    assert "also used outside" in kept["other"]
    assert "differ, or may, from those" in kept["normalised/layer_instance"]
    small = ij.compress(net, **options)
    assert [glob for glob, _ in ij.nnx.plan_of(small).rules] == ["plain"]
    rows = ij.count_cost(nnx.clone(small), (1, *SHAPE)).rows
    assert {row.path: row.note for row in rows if row.note} == kept
    np.testing.assert_allclose(small(X), net(X), atol=1e-5)
    with pytest.raises(ValueError, match="at 'doubled', which is a Doubled"):
        ij.nnx.apply_plan(net, ij.Plan((("doubled", ij.Tucker2(1, 1)),)))


class Stateful(nnx.Module):
    def __init__(self):
        self.conv, self.norm = conv(), nnx.BatchNorm(4, rngs=nnx.Rngs(1))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(2))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.drop(self.norm(self.conv(x)))


def test_a_call_of_the_model_changes_what_a_call_of_the_module_changes():
    net = Stateful()
    model, variables = ij.nnx.as_linen(net)
    net.train()
    collections = [name for name in variables if name != "params"]
    y, changed = model.apply(variables, X, train=True, mutable=collections)
    np.testing.assert_allclose(y, net(X), atol=1e-6)  # the same units are dropped
    _, expected = ij.nnx.as_linen(net)
    for name in collections:
        for a, b in zip(
            jax.tree.leaves(changed[name]), jax.tree.leaves(expected[name]), strict=True
        ):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert changed["Variable"]["calls"] == 1


class Plain(nnx.Module):
    def __init__(self):
        self.conv1, self.bn = conv(1), nnx.BatchNorm(4, rngs=nnx.Rngs(2))
        self.conv2 = conv(3)
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(4))

    def features(self, x):
        return nnx.relu(self.bn(self.conv1(x)))

    def __call__(self, x):
        return self.conv2(self.drop(self.features(x))).mean((1, 2))


class Jitted(Plain):
    features = nnx.jit(Plain.features)


class Rematerialised(Plain):
    features = nnx.remat(Plain.features)


class Twice(Plain):
    """All of it goes through two transformations, and so do what they change."""

    features = nnx.remat(nnx.jit(Plain.features, graph_updates=False))
    __call__ = nnx.jit(Plain.__call__)


IMAGES = np.random.default_rng(1).normal(size=(16, *SHAPE)).astype(np.float32)
OPTIONS = {"calibration": IMAGES, "batch_size": 8}
# Of a module: a function of this library, and what it is called with.
CHANGES = {
    "compress": (ij.compress, {"ranks": ij.Ratio(0.5), **OPTIONS}),
    "make_inertial": (ij.make_inertial, {"macs": 0.95, **OPTIONS}),
    "recalibrate": (
        ij.recalibrate_batch_norm,
        {"images": IMAGES, "batch_size": 8},
    ),
    "fold": (ij.fold_batch_norm, {"image_shape": SHAPE}),
}


@pytest.fixture(scope="module")
def changed():
    """What the functions make of the module without transformations."""
    return {name: call(Plain(), **how) for name, (call, how) in CHANGES.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in (Jitted, Rematerialised, Twice)
        for name in CHANGES
        if (cls, name) != (Twice, "make_inertial")  # below
    ],
)
def test_layers_inside_jit_and_remat_are_changed_as_others_are(cls, name, changed):
    call, how = CHANGES[name]
    found, expected = call(cls(), **how), changed[name]
    assert ij.nnx.plan_of(found) == ij.nnx.plan_of(expected)
    states = [nnx.to_pure_dict(nnx.state(net)) for net in (found, expected)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, atol=1e-5)
    for net in (found, expected):
        net.eval()
    np.testing.assert_allclose(found(X), expected(X), atol=1e-5)
    costs = [ij.count_cost(net, SHAPE).rows for net in (found, expected)]
    assert costs[0] == costs[1]


class Closed(Plain):
    """JAX's own transformation does not pass on what a layer changes inside of it."""

    def features(self, x):
        return nnx.relu(self.bn(jax.checkpoint(lambda x: self.conv1(x))(x)))


@pytest.mark.slow
def test_what_a_transformation_does_not_pass_on_is_said():
    half = {"ranks": ij.Ratio(0.5)}
    found = ij.compress(Closed(), image_shape=SHAPE, **half)
    expected = ij.compress(Plain(), image_shape=SHAPE, **half)
    assert found.conv1.spec == found.conv2.spec == ij.Tucker2(2, 2)
    for net in (found, expected):
        net.eval()
    np.testing.assert_allclose(found(X), expected(X), atol=1e-6)
    model, _ = ij.compress(*ij.nnx.as_linen(Closed()), **half, **OPTIONS)
    assert dict(model.kept)["conv1"].startswith("is called inside nn.scan, nn.vmap or")
    assert [glob for glob, _ in model.plan.rules] == ["conv2"]
    # First variables of factors are made all the same.
    model, _ = ij.compress(*ij.nnx.as_linen(Closed()), image_shape=SHAPE, **half)
    assert ij.count_cost(model, SHAPE).rows == ij.count_cost(expected, SHAPE).rows
    for cls in (Closed, Twice):  # without updates of the graph, nothing is sown
        with pytest.raises(ValueError, match="'conv1' cannot say what its friction is"):
            ij.make_inertial(cls(), macs=0.95, **OPTIONS)


class Mixed(nnx.Module):
    def __init__(self):
        self.conv = conv()
        self.spread = nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(1))
        self.gather = nnx.Einsum("nhwab,abc->nc", (2, 3, 5), rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.gather(self.spread(self.conv(x)))


def test_linear_layers_of_several_axes_are_counted_and_stay():
    net = Mixed()
    rows = {row.path: row for row in ij.count_cost(net, SHAPE).rows}
    assert (rows["spread"].macs, rows["spread"].params) == (36 * 4 * 6, 4 * 6 + 6)
    assert (rows["gather"].macs, rows["gather"].params) == (36 * 6 * 5, 6 * 5)
    options = {"ranks": ij.Ratio(0.5), "image_shape": SHAPE, "linear": True}
    model, _ = ij.compress(*ij.nnx.as_linen(net), **options)
    assert dict(model.kept) == {
        path: f"is an nnx.{name}, of which there is no factorised form"
        for path, name in (("spread", "LinearGeneral"), ("gather", "Einsum"))
    }
    assert ij.compress(net, **options).conv.spec == ij.Tucker2(2, 2)
