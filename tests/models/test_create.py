"""Networks are made by name, and their first variables drawn."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations

import inertia_jax as ij
from inertia_jax.models import create

KEY = jax.random.key(3)


class Foreign(nn.Module):
    """A network with three initialisers of Flax."""

    @nn.compact
    def __call__(self, x, *, train):
        self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        self.variable("counts", "key", lambda: self.make_rng("params"))
        x = nn.Dense(1000, kernel_init=nn.initializers.normal(0.5), name="normal")(x)
        x = nn.Dense(100, name="truncated")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        uniform = nn.initializers.uniform(0.25)
        return nn.Dense(100, bias_init=uniform, name="uniform")(x)


def lenet():
    return ij.create_model("lenet", width=0.1)


@pytest.mark.slow
def test_first_variables_are_those_that_flax_draws():
    for model, shape in ((lenet(), (28, 28, 1)), (Foreign(), (4, 4, 8))):
        images = jnp.zeros((1, *shape))
        expected = jax.jit(lambda key, m=model, x=images: m.init(key, x, train=False))(
            KEY
        )
        drawn = ij.init_variables(model, KEY, shape)
        assert jax.tree.structure(drawn) == jax.tree.structure(expected)
        types = [[leaf.dtype for leaf in jax.tree.leaves(v)] for v in (drawn, expected)]
        assert types[0] == types[1]
        numbers = lambda v: {k: v[k] for k in v if k != "counts"}  # noqa: E731
        # A product and a sum may be one operation or two.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            numbers(drawn),
            numbers(expected),
        )


def test_a_key_always_draws_the_same_and_another_key_draws_others():
    first, again = (ij.init_variables(lenet(), KEY) for _ in range(2))
    other = ij.init_variables(lenet(), jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = first["params"]["conv2"]["kernel"], other["params"]["conv2"]["kernel"]
    assert not np.allclose(*kernels)


def test_distributions_are_the_initialisers():
    params = ij.init_variables(Foreign(), KEY, (4, 4, 8))["params"]
    values = {
        name: np.asarray(leaves["kernel"])
        for name, leaves in params.items()
        if "kernel" in leaves
    }
    assert values["normal"].mean() == pytest.approx(0, abs=0.03)
    assert values["normal"].std() == pytest.approx(0.5, rel=0.03)
    assert np.abs(values["normal"]).max() > 1.5
    # Normal within two deviations, scaled so that the variance is 1 / fan_in.
    deviation = 1000**-0.5
    assert values["truncated"].std() == pytest.approx(deviation, rel=0.02)
    assert np.abs(values["truncated"]).max() <= 2 * deviation / 0.8796 * 1.001
    bias = np.asarray(params["uniform"]["bias"])
    assert 0 <= bias.min() < 0.03
    assert 0.22 < bias.max() <= 0.25
    assert np.asarray(params["norm"]["scale"]).tolist() == [1] * 100


def test_drawing_is_compiled_quickly_and_only_where_that_is_possible(monkeypatch):
    options = []
    compile_program = jax.stages.Lowered.compile

    def spy(lowered, chosen=None):
        options.append(chosen)
        return compile_program(lowered, chosen)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    ij.init_variables(lenet(), KEY)
    draw = lambda key: ij.init_variables(lenet(), key)["params"]["fc2"]  # noqa: E731
    two = jax.vmap(draw)(jax.random.split(KEY))
    inside = jax.jit(draw)(KEY)
    assert two["kernel"].shape == (2, *inside["kernel"].shape)
    # A constant key under a transformation.
    jax.eval_shape(lambda: draw(KEY))
    assert options == [{"xla_backend_optimization_level": 0}]


def test_shapes_are_known_without_drawing():
    with compilations() as compiled:
        shapes = create.abstract_variables(lenet())
    assert compiled == []
    assert shapes["params"]["fc2"]["bias"].shape == (10,)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resent18", "resnet18"),
        ("ResNet20", "resnet20"),
        ("vgg-16", "vgg16"),
        ("lent", "lenet"),
    ],
)
def test_a_misspelt_network_is_answered_with_the_near_one(name, near):
    with pytest.raises(ValueError, match=f"resnet18.*Did you mean {near}\\?"):
        ij.create_model(name)


def test_what_is_like_no_name_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"simpledla, vgg16\.$"):
        ij.create_model("xyz")


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("dtype", np.ones(3, np.float32), "must be one of bfloat16, float32, float64"),
        ("dtype", None, "must be one of bfloat16, float32, float64"),
        ("dtype", ["float32"], "must be one of bfloat16, float32, float64"),
        ("name", ["resnet18"], "must be one of lenet"),
        ("name", np.array(["resnet18", "vgg16"]), "must be one of lenet"),
        ("width", np.ones(2), "must be a number > 0"),
        ("width", "0.5", "must be a number > 0"),
        ("stem", np.array(["cifar", "cifar"]), "must be one of"),
        ("shortcut", ["A"], "must be one of"),
        ("num_classes", np.ones(2, int), "must be an integer >= 1"),
        ("axis_name", np.ones(2), "must be a name, or None"),
    ],
)
def test_a_value_of_another_kind_breaks_the_rule_and_nothing_else(
    argument, value, rule
):
    with pytest.raises(ValueError, match=rf"`{argument}` \(=.*{rule}"):
        ij.create_model(**{"name": "resnet18", argument: value})


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("width", [np.float32(0.5), np.array(0.5), 1, jnp.array(0.5)])
def test_numbers_of_numpy_and_jax_are_numbers(width):
    model = ij.create_model("lenet", width=width)
    assert model.width == float(width)
    assert type(model.width) in (int, float)


def test_choices_suggest_the_near_miss():
    with pytest.raises(ValueError, match=r"`reading` .*Did you mean tiled\?"):
        ij.Inertial(3, 4, reading="tilde")
    with pytest.raises(ValueError, match=r"`stem` .*Did you mean imagenet\?"):
        ij.create_model("resnet18", stem="imagnet")
    # As near by their letters are resnet32 and resnet110, which begin otherwise.
    with pytest.raises(ValueError, match=r"`name` .*Did you mean resnet20\?"):
        ij.create_model("resnet21")


@pytest.mark.parametrize("module", ["", ".ops", ".models", ".plan"])
def test_dir_lists_public_names_and_modules_still_import(module):
    package = importlib.import_module(f"inertia_jax{module}")
    more = {"__version__"} if not module else set()
    assert set(dir(package)) == set(package.__all__) | more
    assert all(hasattr(package, name) for name in dir(package))
    import inertia_jax.compression.tucker as tucker
    import inertia_jax.plan.specs

    assert inertia_jax.plan.specs.Conv is ij.Conv
    assert ij.compress.__wrapped__ is tucker.compress


class Called(nn.Module):
    """A network that is called in a way of its own."""

    @nn.compact
    def __call__(self, inputs, phase):
        x = nn.Dense(3, name="dense")(inputs["x"])
        return {"logits": nn.Dropout(0.5, deterministic=phase != "fit")(x)}


def test_first_variables_of_a_network_called_in_its_own_way():
    def call(model, images, train):
        return model({"x": images}, "fit" if train else "test")["logits"]

    drawn = ij.init_variables(Called(), KEY, (2, 2, 4), apply_fn=call)
    expected = Called().init(KEY, {"x": jnp.zeros((1, 2, 2, 4))}, "test")
    # Drawn inside one program, products are rounded otherwise.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), drawn, expected)
    with pytest.raises((ValueError, TypeError, IndexError)):
        ij.init_variables(Called(), KEY, (2, 2, 4))


def test_narrow_parameters_of_other_models_stay_narrow():
    for dtype in (None, jnp.float32):
        model = nn.Conv(4, (3, 3), dtype=dtype, param_dtype=jnp.bfloat16)
        found = ij.init_variables(model, jax.random.key(0), (8, 8, 3))
        types = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
        assert types == {"bfloat16"}


def test_statistics_of_other_models_are_as_wide_as_after_a_step(x64):
    class Net(nn.Module):
        dtype: object = jnp.float64

        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(not train, dtype=self.dtype)(x)

    found = ij.init_variables(Net(), jax.random.key(0), (4, 4, 3))
    x = jnp.ones((2, 4, 4, 3))
    _, after = Net().apply(found, x, train=True, mutable="batch_stats")
    types = jax.tree.map(jnp.result_type, dict(after))
    assert types == jax.tree.map(jnp.result_type, {"batch_stats": found["batch_stats"]})


def test_a_shape_may_be_an_array(no_shape_checks):
    model = ij.create_model("lenet", width=0.1)
    shape = np.array([28, 28, 1])
    assert ij.count_cost(model, shape).macs == ij.count_cost(model, (28, 28, 1)).macs
