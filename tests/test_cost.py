"""The cost table, by hand."""

import jax.numpy as jnp
import pytest
from flax import linen as nn

import inertia_jax as ij


class Mixed(nn.Module):
    """A network of someone else's: grouped convolution, norm, dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, padding="VALID", name="first")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False, name="groups")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)) + jnp.float32(0))


def test_any_linen_model_is_counted():
    table = ij.count_cost(Mixed(), (9, 9, 4))
    rows = {row.path: row for row in table.rows}
    # 9 -> 4 positions at stride 2 without padding.
    assert rows["first"].macs == 4 * 4 * 8 * 3 * 3 * 4
    assert rows["first"].params == 3 * 3 * 4 * 8 + 8
    assert rows["groups"].macs == 4 * 4 * 8 * 3 * 3 * (8 // 4)
    assert rows["norm"] == ij.LayerCost("norm", "other", (), 16, 0)
    assert rows["head"].macs == 8 * 5
    assert table.params == sum(row.params for row in table.rows)
    assert [row.path for row in table.rows] == ["first", "groups", "norm", "head"]


def test_a_batch_costs_what_one_image_does():
    model = ij.create_model("resnet20", width=0.5)
    assert ij.count_cost(model, (7, 32, 32, 3)) == ij.count_cost(model, (32, 32, 3))


def test_the_table_prints_totals():
    text = str(ij.count_cost(ij.create_model("lenet"), (28, 28, 1)))
    assert text.splitlines()[0].split() == ["layer", "output", "parameters", "MACs"]
    assert text.splitlines()[-1].split() == ["total", "1,199,882", "11,992,448"]


@pytest.mark.parametrize("shape", [(32, 32), (0, 32, 3), (1, 1, 32, 32, 3)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="`input_shape`"):
        ij.count_cost(ij.create_model("resnet20"), shape)
