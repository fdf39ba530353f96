"""The suite `compile`: its programs on CPU, its record, and a real program of a TPU."""

import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from inertia_jax.chips.chip import find_chip
from inertia_jax.models.create import abstract_variables
from train.__main__ import main
from train.benchmark import compile as bench_compile
from train.benchmark.gpu import read_gpu_program
from train.benchmark.programs import NETWORKS, PROGRAMS
from train.machine.parallel import Parallel

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
COMMAND = ["benchmark", "--suite", "compile", "--models", "lenet", "--width", "0.1"]
PROGRAM = """
  %a = f32[250]{0} all-reduce(%x), channel_id=1
"""


def test_programs_are_those_of_a_network():
    def result(network, program, num_devices):
        model = NETWORKS[network]("lenet", width=0.2, dtype=jnp.bfloat16)
        parallel = Parallel("shard_map", tuple(jax.devices()[:num_devices]))
        function, shapes = PROGRAMS[program](model, parallel, batch_size=3)
        return jax.eval_shape(function, *shapes)

    state, totals = result("tucker", "train", 2)
    assert totals.count.shape == ()
    types = {leaf.dtype for leaf in jax.tree.leaves(state.params)}
    assert types == {jnp.dtype("float32")}
    assert "u_in" in state.params["conv2"]
    found = result("tiled", "evaluate", 2)
    assert found["prediction"].shape == (6,) and set(found["gate_rates"]) == {
        "conv1",
        "conv2",
    }
    assert result("dense", "export", 1).shape == (3, 10)


@pytest.fixture
def compiled(monkeypatch):
    """A chip of eight CPU devices; gives the texts of the programs it compiles."""
    texts = []

    def compile_lowered(lowered, *, chip):
        texts.append(lowered.as_text())
        return types.SimpleNamespace(as_text=lambda: PROGRAM)

    names = {
        "topology": lambda chip, n: types.SimpleNamespace(devices=jax.devices()[:n]),
        "compile_lowered": compile_lowered,
        "estimate": lambda compiled: bench_compile.Estimate(
            2e9, 4e9, 3_000_000, 9, 7, 5
        ),
        "versions": lambda device: {"libtpu": "1"},
    }
    for name, function in names.items():
        monkeypatch.setattr(bench_compile, name, function)
    return texts


def test_a_record_grows_and_nothing_is_compiled_twice(compiled, tmp_path, capsys):
    out = tmp_path / "record.json"
    once = ["--networks", "dense", "--programs", "evaluate", "--dtypes", "bfloat16"]
    for chips in (["1"], ["4"], ["4", "1"]):
        command = [*COMMAND, *once, "--chips", *chips, "--out", str(out)]
        assert main(command) == 0
    assert len(compiled) == 2
    rows = json.loads(out.read_text())["rows"]
    assert [row["chips"] for row in rows] == [1, 4]
    chip = find_chip("v5e")
    assert rows[0]["milliseconds"] == {
        "computing": pytest.approx(2e12 / chip.bfloat16_flops),
        "moving": pytest.approx(4e12 / chip.memory_bandwidth),
        "scheduled": pytest.approx(3e9 / chip.clock_hz),
    }
    (sent,) = rows[1]["collectives"]
    assert (sent["count"], sent["num_bytes"], sent["num_beside"]) == (1, 1000, 0)
    said = capsys.readouterr().out
    assert "1 all-reduce, 1,000 bytes" in said and "3,000,000 cycles" in said
    # Another program is compiled anew, and takes the place of the old one.
    rows[0]["program_sha256"] = "another"
    out.write_text(json.dumps({"rows": rows}))
    assert main([*COMMAND, *once, "--out", str(out)]) == 0
    assert len(compiled) == 3
    assert [row["chips"] for row in json.loads(out.read_text())["rows"]] == [1, 4]


def test_a_network_s_cycles_stand_beside_the_dense_one_s(compiled, tmp_path, capsys):
    out = tmp_path / "record.json"
    once = ["--programs", "evaluate", "--dtypes", "bfloat16", "--out", str(out)]
    assert main([*COMMAND, *once, "--networks", "dense"]) == 0
    record = json.loads(out.read_text())
    record["rows"][0]["cycles"] = 2_400_000
    out.write_text(json.dumps(record))
    assert main([*COMMAND, *once, "--networks", "dense", "tiled"]) == 0
    dense, tiled = json.loads(out.read_text())["rows"]
    assert tiled["cycles_of_dense"] == 1.25 and "cycles_of_dense" not in dense
    said = capsys.readouterr().out
    assert "1.25 of the dense network's cycles: no quicker" in said


def test_records_and_chips_that_cannot_be_are_refused(compiled, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"rows": [{"model": "lenet"}]}')
    for options, said in {
        ("--device", "v5"): "`device` (=v5) must be one of v4, v5e, v5p, v6e, h100.",
        ("--chips", "0"): "`chips` (=(0,))",
        ("--out", str(other)): "must be a record of this suite, or new",
        (
            "--device",
            "h100",
            "--chips",
            "9",
        ): "`chips` (=9) must be at most 8, or a multiple of it.",
    }.items():
        assert main([*COMMAND, *options]) == 2
        assert said in capsys.readouterr().err
    assert compiled == []


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is there")
def test_without_libtpu_the_extra_is_named(capsys):
    assert main(COMMAND) == 2
    assert "pip install '.[tpu]' in the checkout" in capsys.readouterr().err


def test_what_a_gpu_does_is_read_from_its_program():
    text = """
      %f = bf16[8]{0} fusion(%x), kind=kLoop, calls=%c
      %a = (bf16[8]{0}, u8[0]{0}) custom-call(%f), custom_call_target="__cudnn$convForward"
      %b = (bf16[8]{0}, u8[0]{0}) custom-call(%f), custom_call_target="__cudnn$convForward"
      %c = bf16[8]{0} convolution(%f, %f)
    """  # noqa: E501
    sizes = {"argument": 100, "output": 20, "alias": 10, "temp": 5}
    memory = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
    program = types.SimpleNamespace(
        as_text=lambda: text, memory_analysis=lambda: types.SimpleNamespace(**memory)
    )
    assert read_gpu_program(program) == {
        "memory_bytes": 115,
        "num_fusions": 1,
        "cudnn": {"convForward": 2},
        "other_convolutions": 1,
    }


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: the extra `tpu`")
def test_a_step_for_four_chips_sends_what_it_must(tmp_path):
    out = tmp_path / "record.json"
    once = ["--networks", "dense", "--programs", "train", "--dtypes", "bfloat16"]
    assert main([*COMMAND, *once, "--chips", "4", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    shapes = abstract_variables(NETWORKS["dense"]("lenet", width=0.1))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # Gradients in float32, and four sums of the metrics.
    assert sum(sent["num_bytes"] for sent in row["collectives"]) == 4 * params + 16
    assert {sent["kind"] for sent in row["collectives"]} == {"all-reduce"}
    assert row["cycles"] > 0 and row["num_uncosted"] < row["num_operations"]
    assert row["memory_bytes"] < find_chip("v5e").memory_bytes
