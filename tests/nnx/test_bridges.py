"""NNX modules that hold Linen models by `nnx.bridge.ToNNX`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from nnx_networks import SHAPE, X

import inertia_jax as ij

FULL = {"ranks": ij.Ratio(1.0), "only_cheaper": False}


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(not train, name="bn1")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Conv(8, (3, 3), use_bias=False, name="last")(x)


class Hybrid(nnx.Module):
    def __init__(self, backbone=None):
        rngs = nnx.Rngs(0)
        model = backbone or Backbone()
        self.backbone = nnx.bridge.ToNNX(model, rngs=rngs).lazy_init(X)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        # The backbone has a layer of this name, too.
        self.conv1 = nnx.Conv(8, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.conv1(nnx.relu(self.norm(self.backbone(x)))).mean((1, 2))


class JittedHybrid(Hybrid):
    __call__ = nnx.jit(Hybrid.__call__)


@pytest.mark.slow
@pytest.mark.parametrize("cls", (Hybrid, JittedHybrid))
def test_layers_of_linen_models_inside_of_modules_are_changed(cls):
    net = cls()
    net.eval()
    plan = ij.Plan((("backbone/*", ij.Tucker2(4, 8)), ("conv1", ij.Tucker2(8, 4))))
    small = ij.compress(net, ranks=plan, image_shape=SHAPE)
    inside = small.backbone.to_nnx__module
    assert isinstance(inside, ij.Planned) and len(inside.plan.rules) == 2
    assert inside.plan.spec("conv1") == ij.Tucker2(4, 8)
    assert small.conv1.spec == ij.Tucker2(8, 4)
    paths = {glob for glob, _ in ij.nnx.plan_of(small).rules}
    assert paths == {"backbone/conv1", "backbone/last", "conv1"}
    rows = {row.path: row.kind for row in ij.count_cost(small, SHAPE).rows}
    assert [rows[path] for path in sorted(paths)] == ["tucker2"] * 3
    full = ij.compress(net, **FULL, calibration=X, batch_size=8)
    np.testing.assert_allclose(full(X), net(X), atol=1e-5)
    back = ij.decompress(full, image_shape=SHAPE)
    assert isinstance(back.conv1, nnx.Conv) and ij.nnx.plan_of(back) == ij.Plan()
    np.testing.assert_allclose(back(X), net(X), atol=1e-5)


def test_batch_norm_is_folded_into_kernels_of_linen_models():
    net = ij.recalibrate_batch_norm(Hybrid(), X, batch_size=8)
    net.backbone.bn1["mean"] = nnx.BatchStat(jnp.arange(8.0))
    net.eval()
    folded = ij.fold_batch_norm(net, image_shape=SHAPE)
    assert not nnx.state(folded, nnx.BatchStat)
    np.testing.assert_allclose(folded(X), net(X), atol=1e-4)


@pytest.mark.slow
def test_a_network_of_the_library_may_be_part_of_a_module():
    class Both(nnx.Module):
        def __init__(self):
            self.net = ij.nnx.create_model("lenet", width=0.1, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(10, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(self.net(x))

    net, images = Both(), np.ones((2, 28, 28, 1), np.float32)
    small = ij.compress(net, ranks=ij.Ratio(0.5), image_shape=images.shape[1:])
    assert small.net.to_nnx__module.plan.rules
    made = ij.nnx.apply_plan(net, ij.nnx.plan_of(small))
    nnx.update(made, nnx.state(small))
    for each in (made, small):
        each.eval()
    np.testing.assert_array_equal(made(images), small(images))
    other = Hybrid()
    with pytest.raises(ValueError, match="a Backbone of Linen; must be a network"):
        ij.nnx.apply_plan(other, ij.Plan((("*", ij.Tucker2(1, 1)),)))


def test_linen_models_draw_the_keys_that_their_bridge_draws():
    class Drawing(Hybrid):
        def __call__(self, x):
            return self.backbone(x, train=True, mutable=["batch_stats"])

    net = Drawing()
    model, variables = ij.nnx.as_linen(net)
    mutable = [name for name in variables if name != "params"]
    y, changed = model.apply(variables, X, train=True, mutable=mutable)
    np.testing.assert_allclose(y, net(X), atol=1e-6)
    _, expected = ij.nnx.as_linen(net)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        changed["batch_stats"],
        {**expected["batch_stats"]},
    )
