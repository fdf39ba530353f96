"""A budget of latency that the whole network keeps, whatever its layers take alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.compression.sites import split_convolutions
from inertia_jax.compression.whole_network import (
    Allowance,
    Choice,
    choice_within,
    network_in,
)

LEAST_MS, MOST_MS = 20.0, 100.0


def search(share, share_at, *, step=0.1, now=1.0):
    """Returns the steps of the choice that is found, its share, and what was timed.

    An allowance chooses the multiple of `step` below it.
    """
    timed, told = [], []

    def share_of(choice):
        timed.append(choice.specs["steps"] * step)
        return share_at(timed[-1])

    choice, reached = choice_within(
        share,
        lambda ms: Choice({"steps": int(ms / step + 1e-6)}, {}),
        share_of,
        least_ms=LEAST_MS,
        most=Allowance(MOST_MS, now),
        progress=lambda *counts: told.append(counts),
    )
    assert len({*timed}) == len(timed)
    assert told[-1] == (4, 4) and all(0 <= done <= 4 for done, _ in told)
    return choice.specs["steps"] * step, reached, timed


def test_a_sum_of_layers_that_is_right_is_timed_once():
    ms, reached, timed = search(0.6, lambda ms: ms / MOST_MS)
    assert reached == pytest.approx(0.591) and len(timed) == 1
    assert ms == pytest.approx(59.1)


# What networks take: less than their layers, much more, and more by steps.
NETWORKS = {
    "less": lambda ms: 1 - 1.8 * (1 - ms / 100),
    "more": lambda ms: 1 - 0.45 * (1 - ms / 100),
    "bent": lambda ms: (ms / 100) ** 3,
    "steps": lambda ms: 0.1 + 0.9 * np.round(ms / 100, 1),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("share", [0.7, 0.8, 0.9])
def test_the_network_takes_what_is_asked(kind, share):
    _, reached, timed = search(share, NETWORKS[kind])
    best = 0.9 if kind == "steps" else 0.97
    assert best * share <= reached <= share
    assert len(timed) <= 4


def test_a_network_that_has_been_compressed_is_compressed_further():
    _, reached, timed = search(0.5, lambda ms: 0.8 * ms / MOST_MS, now=0.8)
    assert 0.97 * 0.5 <= reached <= 0.5 and len(timed) == 1


def test_choices_that_repeat_are_timed_once():
    ms, reached, timed = search(0.7, lambda ms: ms / MOST_MS, step=15.0)
    # 60 is chosen below 75, and 75 takes too much.
    assert (ms, reached) == (60.0, pytest.approx(0.6))
    assert len(timed) <= 2


def test_a_budget_below_all_networks_leads_to_the_least():
    ms, reached, timed = search(0.3, lambda ms: 0.5 + 0.5 * ms / MOST_MS)
    assert (ms, reached) == (LEAST_MS, pytest.approx(0.6))
    assert len(timed) <= 5


class Layers(nn.Module):
    """Layers of the kinds that take factors, with a bias and without."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(8, (1, 1), use_bias=False, name="pointwise")(x)
        x = nn.Conv(8, (3, 3), param_dtype=jnp.bfloat16, name="stays")(x)
        return nn.Dense(6, name="linear")(x.mean((1, 2)))


@pytest.mark.slow
def test_a_network_is_timed_with_kernels_of_the_shapes_of_its_factors():
    model, shape = Layers(), (6, 6, 4)
    variables = model.init(jax.random.key(0), np.zeros((1, *shape)))
    specs = {
        "grouped": ij.Tucker2(1, 3),
        "pointwise": ij.LowRank(5),
        "stays": ij.Conv(),
        "linear": ij.LowRank(2),
    }
    sites, _ = split_convolutions(model, variables, shape, None, linear=True)
    drawn = network_in((model, variables), sites, specs)
    plan = ij.Plan(tuple(specs.items()))
    small = ij.compress(model, variables, ranks=plan, linear=True, image_shape=shape)
    of_leaf = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(of_leaf, drawn[1]) == jax.tree.map(of_leaf, small[1])
    assert drawn[0].plan.spec("grouped") == ij.Tucker2(1, 3)
    assert drawn[0].apply(drawn[1], np.ones((2, *shape))).shape == (2, 6)
    same, _ = network_in((model, variables), sites, {"grouped": ij.Conv()})
    assert same is model
