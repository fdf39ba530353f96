"""The cost table, by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.cost.table import aligned


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


def test_tables_are_as_wide_as_their_cells():
    lines = [["layer", "kind", "MACs"], ["a", "dense", "1,234"], ["b", "c"]]
    expected = "layer  kind    MACs\na      dense  1,234\nb      c"
    assert aligned(lines, left=2) == expected
    assert aligned(lines[1:], left=0) == "a  dense  1,234\nb      c"


@pytest.mark.parametrize("shape", [(32, 32), (0, 32, 3), (1, 1, 32, 32, 3)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="`input_shape`"):
        ij.count_cost(ij.create_model("resnet20"), shape)


class _Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        shared = nn.Conv(8, (3, 3), name="shared")
        x = shared(shared(nn.Conv(8, (1, 1))(x)))
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x).mean((1, 2)))


def test_a_layer_called_twice_counts_twice_and_train_needs_no_default():
    table = ij.count_cost(_Twice(), (8, 8, 8))
    assert table.macs == 64 * 64 + 2 * 64 * 9 * 64 + 24
    assert table.params == 72 + 584 + 16 + 27
    # Also where something stands in for it, whose parts are called twice.
    variables = _Twice().init(jax.random.key(0), jnp.ones((1, 8, 8, 8)), False)
    model, changed = ij.compress(
        _Twice(), variables, ranks=ij.Ratio(0.25), image_shape=(8, 8, 8)
    )
    row = {row.path: row for row in ij.count_cost(model, (8, 8, 8)).rows}["shared"]
    assert row.dense_macs == 2 * 64 * 9 * 64
    assert row.macs == 2 * 64 * (8 * 2 + 9 * 2 * 2 + 2 * 8)
    assert model.apply(changed, jnp.ones((1, 8, 8, 8)), train=False).shape == (1, 3)
    folded, _ = ij.fold_batch_norm(_Twice(), variables, image_shape=(8, 8, 8))
    assert ij.count_cost(folded, (8, 8, 8)).macs == table.macs


def test_a_layer_by_itself_is_counted():
    assert ij.count_cost(nn.Conv(4, (3, 3)), (8, 8, 8)).macs == 64 * 72 * 4
    layer = ij.Tucker2Conv(4, 3, 2, 2)
    assert ij.count_cost(layer, (8, 8, 8)).macs == 64 * (8 * 2 + 9 * 2 * 2 + 2 * 4)
    strided = ij.InertialConv(4, 1, 3, strides=None)
    assert ij.count_cost(strided, (8, 8, 8)).rows[0].kind == "inertial"


@pytest.mark.slow
def test_a_layer_with_closed_gates_is_counted_closed():
    spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed.CLOSED)
    plan = ij.Plan((("layer2_1/conv?", spec),))
    model = ij.create_model("resnet20", plan=plan)
    rows = {r.path: r for r in ij.count_cost(model, (32, 32, 3)).rows}
    assert rows["layer2_1/conv1"].gate_rate == 0
    assert rows["layer2_1/conv1"].macs == rows["layer2_1/conv1"].core_macs


class _Row(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(8, (3, 3), name="conv")(x), None


class _Scanned(nn.Module):
    row: type = _Row

    @nn.compact
    def __call__(self, x):
        axes, split = {"params": 0}, {"params": True}
        scan = nn.scan(self.row, variable_axes=axes, split_rngs=split, length=4)
        return scan(name="rows")(x, None)[0]


def test_scanned_layers_count_by_their_kernels():
    for row in (_Row, nn.jit(_Row)):
        assert ij.count_cost(_Scanned(row), (8, 8, 8)).macs == 4 * 64 * 72 * 8


class _Again(nn.Module):
    layer: type

    def setup(self):
        self.shared = self.layer(8, (3, 3))

    def __call__(self, x):
        return self.shared(self.shared(x))


def test_a_compiled_layer_called_twice_counts_twice():
    for layer in (nn.Conv, nn.jit(nn.Conv)):
        assert ij.count_cost(_Again(layer), (8, 8, 8)).macs == 2 * 64 * 72 * 8
