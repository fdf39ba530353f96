"""How a network's layers are called, and answered in their place."""

import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.calls import on_calls, plain_variables
from inertia_jax.plan.plan import plan_of, without_ladders


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
