"""Checkpoints of models that this library does not make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing

SHAPE = (8, 8, 1)
PREPROCESSING = Preprocessing(SHAPE, (0.5,), (0.2,))
PLAN = ij.Plan(
    (
        ("b", ij.Tucker2(2, 3)),
        ("a", ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5))),
    )
)
KEPT = (("c", "has 4 groups"),)


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Conv(self.width, (3, 3), name="a")(x)
        x = nn.BatchNorm(use_running_average=deterministic)(x)
        x = nn.relu(nn.Conv(self.width, (3, 3), name="b")(x))
        x = nn.Conv(self.width, (3, 3), feature_group_count=4, name="c")(x)
        return nn.Dense(3)(x.mean((1, 2)))


def drawn(model, seed=0):
    images = np.zeros((1, *SHAPE), np.float32)
    return jax.jit(model.init)(jax.random.key(seed), images)


@pytest.fixture
def saved(tmp_path):
    model = ij.Planned(Net(), PLAN, KEPT)
    variables = drawn(model)
    metadata = Metadata(PREPROCESSING, ("x", "y", "z"), {"step": 7})
    ij.save_checkpoint(tmp_path / "own", model, freeze(variables), metadata=metadata)
    return tmp_path / "own", model, variables


def test_a_model_of_ones_own_comes_back(saved):
    path, model, variables = saved
    # The plan is that of the checkpoint, whatever the model has.
    for mine in (Net(), model, ij.Planned(Net(), ij.Plan((("b", ij.Tucker2(1, 1)),)))):
        loaded, found = ij.load_checkpoint(path, model=mine)
        assert loaded == model
        jax.tree.map(np.testing.assert_array_equal, found, variables)
    metadata = ij.load_metadata(path)
    assert metadata.network == f"{__name__}.Net"
    assert metadata == Metadata(PREPROCESSING, ("x", "y", "z"), {"step": 7})


def test_a_model_without_a_plan_comes_back_as_it_is(tmp_path):
    variables = drawn(Net())
    ij.save_checkpoint(tmp_path / "own", Net(), variables)
    with pytest.raises(ValueError, match="`image_shape` .*must be given for Net"):
        ij.load_checkpoint(tmp_path / "own", model=Net())
    model, found = ij.load_checkpoint(tmp_path / "own", model=Net(), image_shape=SHAPE)
    assert model == Net()
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_a_checkpoint_asks_for_a_model_where_it_has_none(saved, tmp_path):
    path, _, _ = saved
    with pytest.raises(ValueError, match=r"has a .*\.Net, .*give one as `model`"):
        ij.load_checkpoint(path)
    ours = ij.create_model("lenet", width=0.1)
    ij.save_checkpoint(tmp_path / "ours", ours, {"params": {}})
    assert ij.load_metadata(tmp_path / "ours").network == "lenet"
    with pytest.raises(
        ValueError, match=r"`model` \(=Net\) must be None: .* has a lenet"
    ):
        ij.load_checkpoint(tmp_path / "ours", model=Net())
    with pytest.raises(ValueError, match=r"`model` \(=Folded\) must be"):
        ij.save_checkpoint(tmp_path / "folded", ij.Folded(Net()), drawn(Net()))


def test_a_model_of_another_form_is_refused_with_what_differs(saved):
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Conv(4, (3, 3), name="d")(x).mean((1, 2)))

    path, _, _ = saved
    message = r"BatchNorm_0/bias is \(4,\), must be \(8,\); .* and \d+ more\.$"
    with pytest.raises(ValueError, match=message) as caught:
        ij.load_checkpoint(path, model=Net(width=8))
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="the plan's 'b' matches no convolution"):
        ij.load_checkpoint(path, model=Other())
    with pytest.raises(ValueError, match=r"own is not .*`rank_in` \(=2\) must be"):
        ij.load_checkpoint(path, model=Net(width=1))


def test_a_model_of_several_inputs_is_drawn_and_comes_back(tmp_path):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, image, token):
            x = nn.Conv(4, (3, 3))(nn.Conv(4, (3, 3))(image))
            return nn.Dense(3)(x.mean((1, 2)) + nn.Embed(5, 4)(token))

    shape = {"image": (8, 8, 3), "token": jax.ShapeDtypeStruct((), jnp.int32)}

    def call(model, inputs, train):
        return model(inputs["image"], inputs["token"])

    variables = ij.init_variables(Two(), jax.random.key(0), shape, apply_fn=call)
    assert variables["params"]["Embed_0"]["embedding"].shape == (5, 4)
    options = {"image_shape": shape, "apply_fn": call}
    small = ij.compress(Two(), variables, ranks=ij.Ratio(0.5), **options)
    ij.save_checkpoint(tmp_path / "two", *small)
    model, found = ij.load_checkpoint(tmp_path / "two", model=Two(), **options)
    assert model.plan == small[0].plan
    jax.tree.map(np.testing.assert_array_equal, found, dict(small[1]))
