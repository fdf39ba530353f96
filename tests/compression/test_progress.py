"""What computations that take minutes tell of their progress."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.progress import counted

IMAGES = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype(np.float32)


class TwoConvs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(6, (3, 3), name="first")(x))
        return nn.Conv(8, (3, 3), name="second")(x).mean((1, 2))


@pytest.fixture
def told():
    """A list of what was told, and the function that is told."""
    lines = []
    return lines, lambda *line: lines.append(line)


def of_two(what):
    return [(what, done, 2) for done in range(3)]


def test_items_are_counted(told):
    lines, tell = told
    assert list(counted("ab", tell, "letters")) == ["a", "b"]
    assert lines == of_two("letters")
    assert list(counted("ab", None, "letters")) == ["a", "b"]


@pytest.mark.slow
def test_compress_and_reconstruct_tell_of_every_layer(told):
    lines, tell = told
    model = TwoConvs()
    dense = (model, model.init(jax.random.key(0), IMAGES))
    small = ij.compress(
        *dense,
        ranks=ij.Budget(macs=0.6),
        calibration=IMAGES,
        batch_size=4,
        progress=tell,
    )
    assert lines[:6] == [
        *of_two("measuring inputs of layers, batches"),
        *of_two("trying ranks of layers"),
    ]
    assert {what for what, *_ in lines[6:]} == {"factorising layers"}
    lines.clear()
    ij.reconstruct(*small, dense=dense, images=IMAGES, iterations=1, progress=tell)
    assert lines == of_two("fitting layers")
    lines.clear()
    ij.compress(*dense, ranks=ij.Ratio(0.5), image_shape=(6, 6, 4), progress=tell)
    assert lines[:3] == of_two("choosing ranks, layers")


def test_the_search_for_thresholds_tells_how_much_is_saved(told):
    lines, tell = told
    model = ij.create_model("lenet", width=0.1)
    images = np.random.default_rng(0).normal(size=(8, 12, 12, 1)).astype(np.float32)
    variables = ij.init_variables(model, jax.random.key(0), (12, 12, 1))
    options = {"calibration": images, "layers": "conv2", "progress": tell}
    ij.make_inertial(model, variables, macs=0.9, **options)
    assert lines[0] == ("trying to close tiles, layers", 0, 1)
    whats, shares, totals = zip(*lines[1:], strict=True)
    assert set(whats) == {"choosing thresholds, percent"}
    assert set(totals) == {100}
    assert list(shares) == sorted(shares)
    assert 0 < shares[0] <= shares[-1] < 100
