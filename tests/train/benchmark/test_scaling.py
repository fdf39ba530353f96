"""What a training step sends, read off the program that is compiled for 8 devices."""

import dataclasses

import jax
import pytest
from helpers import abstract_state, make_config, synthetic_set

from inertia_jax import Fixed, Inertial, Plan
from train.benchmark.collectives import find_collectives
from train.fit.trainer import Trainer

TILED = Inertial(3, 4, reading="tiled", threshold=Fixed(1.0))
TILED_PLAN = Plan((("*1_0/conv?", TILED),)).to_json()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel", "sync_batch_norm"),
    [
        ("vgg16", "pmap", True),
        ("vgg16", "shard_map", False),
        ("lenet", "pmap", True),  # no BatchNorm
        ("resnet20 tiled", "pmap", True),  # thresholds, too
    ],
)
def test_the_bytes_are_those_of_the_compiled_step(name, parallel, sync_batch_norm):
    name, _, tiled = name.partition(" ")
    config = make_config(
        "float32",
        name,
        16,
        0.0625,
        parallel=parallel,
        sync_batch_norm=sync_batch_norm,
    )
    if tiled:
        model = dataclasses.replace(config.model, plan=TILED_PLAN)
        config = dataclasses.replace(config, model=model)
    trainer = Trainer(config, synthetic_set(num_train=16, num_test=8))
    state = abstract_state(trainer)
    lowered = trainer.lower(state)
    # What is reduced is settled before code is generated, which takes long.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    found = find_collectives(compiled.as_text())
    assert {each.kind for each in found} == {"all-reduce"}
    collections = jax.tree.leaves(state.collections)
    assert sum(leaf.ndim == 0 for leaf in collections) == (2 if tiled else 0)
    # Gradients, moved statistics and thresholds, and four sums of the metrics.
    leaves = [*jax.tree.leaves(state.params), *collections]
    expected = 4 * sum(leaf.size for leaf in leaves) + 16
    if sync_batch_norm:  # of each batch, forward, and their gradients
        expected += 2 * 4 * sum(leaf.size for leaf in collections if leaf.ndim)
    assert sum(each.num_bytes for each in found) == expected
