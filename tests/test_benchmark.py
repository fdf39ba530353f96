"""What `benchmark` measures and records, and what is set before JAX starts."""

import json
import re

import jax
import pytest

from train import platform
from train.__main__ import main

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


def test_what_the_user_set_stays_set(monkeypatch):
    place = jax.config.values["jax_compilation_cache_dir"]
    platform.use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == place
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=1")
    platform.choose_cpu_convolutions()
    assert platform.os.environ["XLA_FLAGS"].count("ynn") == 1


def test_versions_without_the_flag_are_not_given_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--other")
    monkeypatch.setattr(platform.jaxlib.version, "__version_info__", (0, 12, 0))
    platform.choose_cpu_convolutions()
    assert platform.os.environ["XLA_FLAGS"] == "--other"
    monkeypatch.setattr(platform.jaxlib.version, "__version_info__", (0, 10, 2))
    platform.choose_cpu_convolutions()
    flags = platform.os.environ["XLA_FLAGS"]
    assert re.fullmatch(
        "--other --xla_cpu_experimental_ynn_fusion_type=.*REDUCE", flags
    )
