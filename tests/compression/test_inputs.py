"""Inputs of every kind: integers, several by name, and numbers."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij

KEY = jax.random.key(0)


class Tokens(nn.Module):
    """A network of sequences of integers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 8)(tokens)
        x = nn.relu(nn.Conv(16, (3,), name="one")(x))
        return nn.Conv(16, (3,), name="two")(x).mean(1)


@pytest.mark.slow
def test_integers_stay_integers():
    tokens = np.random.default_rng(0).integers(0, 50, (8, 12))
    model = Tokens()
    variables = model.init(KEY, tokens)
    small, factors = ij.compress(
        model, variables, ranks=ij.Ratio(0.5), calibration=tokens
    )
    assert [path for path, _ in small.plan.rules] == ["one", "two"]
    fitted = ij.reconstruct(
        small, factors, dense=(model, variables), images=tokens, iterations=1
    )
    assert np.isfinite(small.apply(fitted, tokens)).all()


@pytest.mark.slow
def test_images_of_integers_are_images(no_shape_checks):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    model = ij.create_model("lenet", width=0.2)
    variables = ij.init_variables(model, KEY)
    small, factors = ij.compress(
        model, variables, ranks=ij.Ratio(0.5), calibration=pixels
    )
    assert small.plan.rules
    assert np.isfinite(small.apply(factors, pixels)).all()


class Timed(nn.Module):
    """A network of images and of one number for each."""

    @nn.compact
    def __call__(self, inputs):
        x = nn.relu(nn.Conv(8, (3, 3), name="one")(inputs["image"]))
        step = nn.Dense(8)(inputs["step"][:, None].astype(np.float32))
        return nn.Conv(8, (3, 3), name="two")(x + step[:, None, None]).mean((1, 2))


def test_one_input_may_be_a_number():
    image = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    inputs, model = {"image": image, "step": np.arange(4)}, Timed()
    variables = model.init(KEY, inputs)
    half = {"ranks": ij.Ratio(0.5)}
    seen, _ = ij.compress(model, variables, calibration=inputs, **half)
    shapes = {"image": (8, 8, 3), "step": ()}
    unseen, _ = ij.compress(model, variables, image_shape=shapes, **half)
    assert [path for path, _ in seen.plan.rules] == ["one", "two"]
    assert seen.plan == unseen.plan
    wrong = {**inputs, "step": np.int32(4)}
    with pytest.raises(ValueError, match=r"`calibration\['step'\]` \(shape \(\)\)"):
        ij.compress(model, variables, calibration=wrong, **half)
    with pytest.raises(ValueError, match="another number of axes, at least two"):
        ij.compress(model, variables, calibration=np.arange(4), **half)
    with pytest.raises(ValueError, match=r"shape of an input \(=\(\)\)"):
        ij.compress(model, variables, image_shape=(), **half)


class Pair(nn.Module):
    """A network of two images."""

    @nn.compact
    def __call__(self, inputs):
        a = nn.Conv(8, (3, 3), name="a")(inputs["a"])
        b = nn.Conv(8, (3, 3), name="b")(inputs["b"])
        return nn.Conv(4, (3, 3), name="last")(nn.relu(a + b)).mean((1, 2))


def test_a_network_of_two_images_is_made_inertial():
    a, b = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 3)).astype(np.float32)
    pair, model = {"a": a, "b": b}, Pair()
    variables = model.init(KEY, pair)
    inertial, changed = ij.make_inertial(model, variables, macs=0.9, calibration=pair)
    rates = {path for path, _ in inertial.plan.rules}
    assert rates and rates <= {"a", "b", "last"}
    shapes = {"a": (8, 8, 3), "b": (8, 8, 3)}
    dense = ij.count_cost(model, shapes).macs
    assert ij.count_cost(inertial, shapes).total_macs <= 0.9 * dense
    assert np.isfinite(inertial.apply(changed, pair)).all()


def test_a_network_of_two_images_is_not_exported(tmp_path, no_shape_checks):
    shapes = {"a": (8, 8, 3), "b": (8, 8, 3)}
    with pytest.raises(ValueError, match="`image_shape` .* must be that of one array"):
        ij.save_exported(tmp_path / "net", (Pair(), {}), image_shape=shapes)


class Axes(nn.Module):
    """Convolutions of one, two and three axes."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(8, (3, 3), name="plane")(image)
        line = nn.Conv(4, (3,), name="line")(x[:, 0])
        volume = nn.Conv(4, (3, 3, 2), name="volume")(x[..., None, :])
        return line.mean(1) + volume.mean((1, 2, 3))


def test_only_two_dimensional_convolutions_are_inertial_and_the_reason_is_said():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    model = Axes()
    variables = model.init(KEY, x)
    inertial, _ = ij.make_inertial(model, variables, macs=0.95, calibration=x)
    assert [path for path, _ in inertial.plan.rules] == ["plane"]
    reason = "is not two-dimensional"
    assert dict(inertial.kept) == {"line": reason, "volume": reason}
    with pytest.raises(ValueError, match=f"line.* {reason}"):
        ij.make_inertial(model, variables, macs=0.9, calibration=x, layers="line")
