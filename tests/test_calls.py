"""How a network's layers are called, and answered in their place."""

import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.calls import (
    apply_network,
    one_array,
    record_calls,
    remembered_calls,
    takes_train,
)
from inertia_jax.intercept import on_calls
from inertia_jax.plan.plan import plan_of, without_ladders
from inertia_jax.variables import plain_variables, subtree


class Two(nn.Module):
    def setup(self):
        self.first = nn.Dense(3)
        self.second = nn.Sequential([nn.Dense(2)])

    def __call__(self, x):
        return self.second(self.double(self.first(x)))

    def double(self, x):
        return 2 * x


def test_every_call_is_answered_and_no_other_method():
    x = jnp.ones((4, 5))
    variables = Two().init(jax.random.key(0), x)
    seen = []

    def answer(module, path, call, args, kwargs):
        seen.append((type(module), path))
        output = call(*args, **kwargs)
        return output + 1 if path == "second/layers_0" else output

    with on_calls(answer):
        answered = Two().apply(variables, x)
    assert seen == [
        (Two, ""),
        (nn.Dense, "first"),
        (nn.Sequential, "second"),
        (nn.Dense, "second/layers_0"),
    ]
    np.testing.assert_array_equal(answered, Two().apply(variables, x) + 1)


def test_only_networks_by_plan_have_a_plan_without_ladders():
    spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.3))
    plan = ij.Plan((("conv2", spec),))
    model = ij.create_model("lenet", plan=plan)
    assert plan_of(model) == plan
    plain = without_ladders(model)
    assert plain.plan == plan.without_ladders() != plan
    assert plan_of(Two()) is None and without_ladders(Two()) == Two()


def test_plain_variables_are_dictionaries_of_the_same_arrays():
    kernel, mean = np.ones((3, 3)), jnp.zeros(3)
    boxed = nn.Partitioned(kernel, names=(None, "model"))
    logical = nn.LogicallyPartitioned(mean, names=("channels",))
    given = {
        "params": flax.core.freeze({"a": {"kernel": boxed}, "b": {}}),
        "batch_stats": types.MappingProxyType({"a": {"mean": logical}}),
    }
    for variables in (given, flax.core.freeze(given)):
        found = plain_variables(variables)
        assert found["params"]["a"]["kernel"] is kernel
        assert found["batch_stats"]["a"]["mean"] is mean
        nodes = (found, *found.values(), *found["params"].values())
        assert all(type(node) is dict for node in nodes)
    assert given["params"]["a"]["kernel"] is boxed


class Mode(nn.Module):
    """Doubles its images in training."""

    @nn.compact
    def __call__(self, x, *, train):
        return x * (2 if train else 1)


class Training(Mode):
    @nn.compact
    def __call__(self, x, training=None):
        return x * (2 if training else 1)


class IsTraining(Mode):
    @nn.compact
    def __call__(self, x, is_training):
        return x * (2 if is_training else 1)


class Deterministic(nn.Module):
    """As Flax's own dropout: a field, or an argument, and not both."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        still = nn.merge_param("deterministic", self.deterministic, deterministic)
        return x * (1 if still else 2)


class RunningAverage(Mode):
    @nn.compact
    def __call__(self, x, use_running_average):
        return x * (1 if use_running_average else 2)


@pytest.mark.parametrize(
    "model", [Mode(), Training(), IsTraining(), Deterministic(), RunningAverage()]
)
def test_networks_are_told_whether_they_are_trained(model):
    assert takes_train(model)
    for train in (False, True):
        outputs, _ = apply_network(model, {}, jnp.ones(3), train=train)
        np.testing.assert_array_equal(outputs, 1 + train)


def test_a_network_that_is_told_by_a_field_is_not_told_again():
    model = Deterministic(deterministic=True)
    assert not takes_train(model)
    np.testing.assert_array_equal(apply_network(model, {}, jnp.ones(3))[0], 1)
    with pytest.raises(
        ValueError, match="Deterministic takes none of train, .*apply_f"
    ):
        apply_network(model, {}, jnp.ones(3), train=True)


class Context(nn.Module):
    @nn.compact
    def __call__(self, x, context, train=False):
        return x + context, self.make_rng("noise")


def test_an_argument_of_ones_own_is_bound_by_a_function():
    x = jnp.ones(3)
    with pytest.raises(
        ValueError, match="Context must be called with 'context', .*app"
    ):
        apply_network(Context(), {}, x)
    with pytest.raises(TypeError) as caught:  # its signature says nothing
        apply_network(nn.Sequential([Context()]), {}, x)
    assert "say how it is called with `apply_fn`" in caught.value.__notes__[0]
    call = lambda model, images, train: model(images, 2.0, train=train)  # noqa: E731
    outputs, _ = apply_network(Context(), {}, x, apply_fn=call)
    np.testing.assert_array_equal(outputs[0], 3)
    with pytest.raises(ValueError, match="returns a tuple; must be one array"):
        one_array(outputs)


def test_paths_may_be_made_of_names_with_slashes():
    tree = {"a": {"c": {"d": 1}}, "a/b": {"c": {"d": 2}}, "a/b/c": 3}
    found = [subtree(tree, path) for path in ("a", "a/c", "a/b", "a/b/c", "b", "")]
    assert found == [tree["a"], {"d": 1}, tree["a/b"], {"d": 2}, {}, tree]


def test_a_model_without_a_layer_that_is_recognised_is_an_error():
    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, (1, 1, 1, 3))

    calls = (
        lambda model: ij.count_cost(model, (4, 4, 3)),
        lambda model: ij.dropped_rules(
            ij.Planned(model, ij.Plan((("*", ij.Inertial(1, 3)),))), (4, 4, 3)
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="no layer that is recognised"):
            call(Mine())
    assert not ij.count_cost(nn.Sequential([nn.relu]), (4, 4, 3)).rows


@pytest.mark.usefixtures("no_shape_checks")
def test_the_class_of_a_model_is_no_model():
    for call in (
        lambda: ij.count_cost(Two, (4, 4, 3)),
        lambda: ij.fold_batch_norm(Two, {}, image_shape=(4, 4, 3)),
    ):
        with pytest.raises(
            ValueError, match=r"`model` .*Two.* must be a Linen model or"
        ):
            call()


def test_a_network_that_cannot_be_traced_names_the_images_and_its_own_error():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(len(x), 7))

    for model in (Flat(), ij.Planned(Flat())):
        message = (
            r"Flat cannot be called on images of shape \(1, 4, 4, 3\). TypeError: "
        )
        with pytest.raises(ValueError, match=message):
            ij.count_cost(model, (4, 4, 3))
        with pytest.raises(ValueError, match=message):
            ij.fold_batch_norm(model, {"params": {}}, image_shape=(4, 4, 3))
        # With any number of images, JAX would see it in the call of the file.
        with pytest.raises(
            ValueError, match=rf"{message}.*\. If Flat is called in anot"
        ):
            ij.save_exported("no", (model, {"params": {}}), image_shape=(4, 4, 3))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (jnp.ones(3), "`variables` .*must be a dictionary of collections"),
        (None, "`variables` .*NoneType.*must be a dictionary of collections"),
        (
            {"params": {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}},
            r"\['params'\]\['a'\] is a shape alone",
        ),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_variables_that_are_no_arrays_are_refused(variables, message, tmp_path):
    nowhere = tmp_path / "nowhere"
    model = ij.create_model("lenet", width=0.1)
    images = np.ones((2, 28, 28, 1), np.float32)
    for call in (
        lambda: ij.compress(model, variables, ranks=ij.Ratio(0.5)),
        lambda: ij.make_inertial(model, variables, macs=0.9, calibration=images),
        lambda: ij.fold_batch_norm(model, variables),
        lambda: ij.recalibrate_batch_norm(model, variables, images),
        lambda: ij.reconstruct(
            model, variables, dense=(model, variables), images=images
        ),
        lambda: ij.save_checkpoint(nowhere, model, variables),
        lambda: ij.save_exported(nowhere, (model, variables), image_shape=(28, 28, 1)),
        lambda: ij.to_torch(model, variables),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not nowhere.exists()


def test_a_model_that_needs_a_key_in_evaluation_has_one():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(3)(nn.Conv(4, (3, 3))(x).mean((1, 2)))

    model, images = Noisy(), np.ones((2, 4, 4, 3), np.float32)
    variables = model.init(jax.random.key(0), images)
    small, factors = ij.compress(
        model, variables, ranks=ij.Ratio(1.0), calibration=images, only_cheaper=False
    )
    outputs = [
        apply_network(*each, images)[0]
        for each in ((model, variables), (small, factors))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5)


class Traced(nn.Module):
    """A layer that says in a list, which is no field, that it is called."""

    seen = []  # noqa: RUF012
    features: int = 3

    @nn.compact
    def __call__(self, x):
        self.seen.append(self.features)
        return nn.Dense(self.features)(x)


def test_equal_models_are_traced_once_where_calls_are_remembered():
    Traced.seen.clear()
    with remembered_calls():
        calls, variables = record_calls(Traced(), (5,))
        calls.clear()  # what one caller does with its own
        again, same = record_calls(Traced(), (5,))
        assert Traced.seen == [3]
        assert [*again] == ["Dense_0", ""] and same is variables
        record_calls(Traced(4), (5,))
        record_calls(Traced(), (6,))
        assert Traced.seen == [3, 4, 3]
    for _ in range(2):
        record_calls(Traced(), (5,))
    assert Traced.seen == [3, 4, 3, 3, 3]


def test_what_a_call_says_wins_over_a_field():
    class Net(nn.Module):
        deterministic: bool = False

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Conv(2, (3, 3), name="c")(x)

    rule = ("c", ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.5)))
    model = ij.Planned(Net(), ij.Plan((rule,)))
    x = np.ones((1, 6, 6, 2), np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    model.apply(variables, x, train=False)  # moves no threshold
    # Without a word in the call, the field has it.
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, x)
