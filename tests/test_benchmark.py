"""What `benchmark` measures and records, and what is set before JAX starts."""

import importlib.util
import json

import jax
import numpy as np
import pytest

import inertia_jax as ij
from inertia_jax.sites import find_sites
from train import platform
from train.__main__ import main
from train.timing import median_with_interval, relative_gap, times_in_turn
from train.verbs import benchmark_verb

WHAT = ("train", "eval")
NARROW = ["--models", "vgg16", "--width", "0.02", "--batch-size", "2", "--repeats", "2"]


def test_steps_are_timed_and_set_against_the_peak(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert main(["benchmark", *NARROW, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert "vgg16       train" in capsys.readouterr().out
    for what in WHAT:
        of = row[what]["jax"]
        assert 0 < of["min_ms"] <= of["median_ms"] <= of["max_ms"]
        assert of["images_per_s"] == pytest.approx(2e3 / of["median_ms"])
        assert 0 < of["share_of_peak"] < 1
        assert of["share_of_peak"] == pytest.approx(of["gflops"] / row["peak_gflops"])
    # Two gradients beside the forward pass.
    flops = [row[w]["jax"]["gflops"] * row[w]["jax"]["median_ms"] for w in WHAT]
    assert flops[0] == pytest.approx(3 * flops[1])


def test_operations_are_timed_beside_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_verb, "STAGES", ((8, 4),))
    out = tmp_path / "record.json"
    command = ["benchmark", "--suite", "ops", "--repeats", "1", "--batch-size", "3"]
    if importlib.util.find_spec("torch") is not None:
        command += ["--against", "torch"]
    assert main([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    times, said = row["times"], capsys.readouterr().out
    assert row["shape"] == [3, 8, 8, 4] and row["rank"] == 2
    names = [name for name in times if not name.endswith(", PyTorch")]
    assert all(f"  {name} " in said for name in names)
    work = {
        k: of["gflops"] * of["median_ms"] for k, of in times.items() if "gflops" in of
    }
    # MACs: 3 x 8 x 8 pixels of 9 x 4 x 4, of 4 x 4, or of 4 x 2 + 9 x 2 x 2 + 2 x 4.
    assert work["conv 3x3"] == pytest.approx(2e-6 * 192 * 144)
    assert work["conv 3x3, gradient"] == pytest.approx(3 * work["conv 3x3"])
    assert work["conv 1x1"] == pytest.approx(2e-6 * 192 * 16)
    assert work["Tucker-2"] == pytest.approx(2e-6 * 192 * 52)
    assert ("conv 3x3, PyTorch" in times) == ("--against" in command)


def test_what_the_loop_adds_is_taken_of_pairs_of_blocks(tmp_path, capsys):
    out = tmp_path / "record.json"
    command = ["benchmark", "--suite", "loop", "--config", "configs/quickstart.py"]
    command += ["--width", "0.01", "--steps", "2", "--repeats", "6"]
    assert main([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["steps"] == 2 and row["rounds"] == 6
    steps, epoch = row["added_to_steps"], row["added_to_epoch"]
    assert -1 < steps["low_95"] <= steps["median"] <= steps["high_95"]
    extra = row["first_input"]["median_ms"] + row["checkpoint"]["median_ms"]
    bare = row["bare"]["median_ms"] / 2 * row["steps_per_epoch"]
    assert epoch["median"] == pytest.approx(steps["median"] + extra / bare)
    assert "the loop adds to steps" in capsys.readouterr().out
    assert main([*command[:-1], "5"]) == 2
    assert "`repeats` (=5) must be >= 6" in capsys.readouterr().err


def test_medians_have_intervals():
    # P(at most 1 of 9 above the median) is 10 / 512; of at most 2 it is 46 / 512.
    found = median_with_interval([9, 2, 7, 4, 5, 6, 3, 8, 1])
    assert found == {"median": 5, "low_95": 2, "high_95": 8}


def test_calls_are_in_turn_and_the_first_round_is_not_timed():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = times_in_turn(functions, repeats=2, calls_before=1)
    assert calls == ["a", "a", "b", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_factors_by_tensorly_in_pytorch_give_the_same_logits():
    reason = "needs PyTorch and TensorLy: the extra `torch`"
    pytest.importorskip("tensorly", reason=reason)
    from train.bench_tucker import tensorly_factors, torch_call

    dense = ij.create_model("resnet18", width=0.2, stem="imagenet")
    shape = (64, 64, 3)
    variables = ij.init_variables(dense, jax.random.key(0), shape)
    model, compressed = ij.compress(
        dense, variables, ranks=ij.Ratio(0.3), image_shape=shape
    )
    factors = tensorly_factors(find_sites(dense, variables, shape), model.plan)
    assert len(factors) == 3 * len(model.plan.rules) > 30
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    found = torch_call(model, compressed, images, changed=factors)()
    expected = model.apply(compressed, images)
    assert relative_gap(found, expected) < 1e-5
    changed = {"layer1.0.conv1.1.weight": 2 * factors["layer1.0.conv1.1.weight"]}
    found = torch_call(model, compressed, images, changed={**factors, **changed})()
    assert relative_gap(found, expected) > 1e-3


def test_what_the_user_set_stays_set(monkeypatch):
    place = jax.config.values["jax_compilation_cache_dir"]
    platform.use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == place
    monkeypatch.setenv(
        "XLA_FLAGS",
        "--xla_cpu_experimental_ynn_fusion_type=1 --xla_cpu_scheduler_type=2",
    )
    platform.choose_cpu_flags()
    flags = platform.os.environ["XLA_FLAGS"]
    assert flags.count("ynn") == flags.count("scheduler") == 1


def test_versions_without_a_flag_are_not_given_it(monkeypatch):
    def chosen(version):
        monkeypatch.setenv("XLA_FLAGS", "--other")
        monkeypatch.setattr(platform.jaxlib.version, "__version_info__", version)
        platform.choose_cpu_flags()
        return platform.os.environ["XLA_FLAGS"]

    ynn = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
    scheduler = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    assert chosen((0, 10, 2)) == f"--other {ynn} {scheduler}"
    assert chosen((0, 12, 0)) == f"--other {scheduler}"
    assert chosen((0, 13, 0)) == "--other"
