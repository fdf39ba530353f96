"""The model of docs/scaling.md: its bytes are the compiled step's, its limits hold."""

import dataclasses
import math
import re

import jax
import pytest
from conftest import ROOT
from helpers import abstract_state, make_config, synthetic_set

from inertia_jax import Fixed, Inertial, Plan, create_model
from train.benchmark.scaling import MARKER, all_steps, tables
from train.benchmark.scaling_model import MACHINES, count_step, efficiency, step_seconds
from train.fit.trainer import Trainer

NVLINK, INFINIBAND = MACHINES[:2]
HLO_BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
TILED = Inertial(3, 4, reading="tiled", threshold=Fixed(1.0))
TILED_PLAN = Plan((("*1_0/conv?", TILED),)).to_json()


def reduced_bytes(hlo: str) -> int:
    """Returns the bytes that a compiled program reduces, of each device."""
    total = 0
    for line in hlo.splitlines():
        found = re.search(r"= (.*?) all-reduce(?:-start)?\(", line)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", found[1] if found else ""):
            total += HLO_BYTES[kind] * math.prod(
                map(int, filter(None, sizes.split(",")))
            )
    return total


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
    found = reduced_bytes(compiled.as_text())
    assert found > 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    if name == "lenet":  # of these images, whose side counts in its linear layer
        params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        assert found == 4 * params + 16
        return
    step = count_step(name, trainer.model)
    assert step.averages == (2 if tiled else 0)
    assert found == step.gradient_bytes + step.norm_bytes * sync_batch_norm


def test_bytes_of_all_reduces_are_read_from_hlo():
    hlo = """
      %a = f32[2,4]{1,0} all-reduce(%x), channel_id=1
      %b = (bf16[3]{0}, /*index=1*/s32[], f32[]) all-reduce(%x, %y, %z), channel_id=2
      %c = f32[8]{0} all-reduce-start(%x), channel_id=3
      %d = f32[8]{0} all-reduce-done(%c)
      %e = f32[100]{0} add(%all-reduce, %x)
    """
    assert reduced_bytes(hlo) == 32 + (6 + 4 + 4) + 32


def test_counts_are_the_published_ones():
    resnet = count_step("resnet18", create_model("resnet18"))
    assert (resnet.params, resnet.macs) == (11_173_962, 555_422_720)
    # 20 BatchNorm layers: five of 64, 128, 256 and 512 channels, the shortcuts' too.
    assert resnet.norms == 20
    assert resnet.statistics == 2 * (5 * 64 + 5 * 128 + 5 * 256 + 5 * 512)
    assert resnet.flops == 6 * 555_422_720


def test_a_step_by_hand():
    step = count_step("lenet", create_model("lenet"))
    options = {"batch_size": 1024, "utilisation": 0.25}
    compute = 6 * 11_992_448 * 128 / (989e12 * 0.25)
    ring = 2 * 7 / 8 * (4 * 1_199_882 + 16) / 450e9 + 2 * 7 * 3e-6
    worst = step_seconds(step, NVLINK, 8, overlap=False, **options)
    assert worst == pytest.approx(compute + ring)
    best = step_seconds(step, NVLINK, 8, overlap=True, **options)
    assert best == pytest.approx(compute + max(0, ring - 2 / 3 * compute))
    assert step_seconds(step, NVLINK, 1, overlap=True, **options) == 8 * compute


def test_efficiency_falls_with_devices_and_rises_with_overlap_and_batch():
    step = count_step("resnet20", create_model("resnet20"))

    def at(n, overlap=False, per_device=128, step=step):
        return efficiency(
            step,
            INFINIBAND,
            n,
            batch_size=per_device * n,
            batch_alone=per_device,
            utilisation=0.3,
            overlap=overlap,
        )

    assert at(1) == pytest.approx(1)
    assert 1 > at(2) > at(8) > at(256) > 0
    assert at(8, overlap=True) > at(8)
    assert at(8, per_device=1024) > at(8)
    assert at(8, step=dataclasses.replace(step, norms=0)) > at(8)


@pytest.mark.slow
def test_the_document_holds_the_tables_of_the_program():
    text = (ROOT / "docs" / "scaling.md").read_text().split(MARKER)[1]
    assert text.strip() == tables(list(all_steps()))


def test_every_machine_joins_as_many_devices_as_it_says():
    text = tables([count_step("lenet", create_model("lenet"))])
    columns = {
        re.search(rf"128 images in all: {machine.name}.*?\n\n(.*?)\n", text, re.S)[1]
        for machine in MACHINES
    }
    upto = lambda *n: "| network | " + " | ".join(map(str, n)) + " |"  # noqa: E731
    assert columns == {
        upto(1, 2, 4, 8),
        upto(1, 2, 4, 8, 16, 32, 64, 128),
        upto(1, 4, 8, 16, 32, 64, 128),
    }
