"""What is the same in every bit each time, as docs/determinism.md says."""

import os
import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from helpers import (
    FIT_ONE,
    assert_bitwise_equal,
    final_arrays,
    relative,
    save_bright_digits,
)
from helpers import start as start_python
from jax.flatten_util import ravel_pytree

import inertia_jax as ij
from train.__main__ import main

# A program that runs on some of the cores.
ON_CORES = """
import os, runpy, sys
os.sched_setaffinity(0, map(int, sys.argv.pop(1).split(",")))
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "determinism.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), (file, test)


@pytest.mark.slow
def test_the_same_training_twice_is_the_same_in_every_bit(tmp_path):
    source = save_bright_digits(tmp_path / "digits.npz", 64, 16, 28)
    for name, seed in (("once", 1), ("twice", 1), ("otherwise", 2)):
        options = ["--data", source, "--seed", str(seed)]
        assert main([*FIT_ONE, *options, "--workdir", str(tmp_path / name)]) == 0
    once, twice, otherwise = (
        final_arrays(tmp_path / name) for name in ("once", "twice", "otherwise")
    )
    assert_bitwise_equal(once, twice)
    with pytest.raises(AssertionError):
        assert_bitwise_equal(once, otherwise)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_one_core_and_two_agree(tmp_path, subprocess_env):
    source = save_bright_digits(tmp_path / "digits.npz", 64, 16, 28)
    for name, cores in (("one", "0"), ("two", "0,1")):
        options = ["--data", source, "--workdir", str(tmp_path / name)]
        command = ["-c", ON_CORES, cores, *FIT_ONE, *options, "--no-huge-pages"]
        with start_python(command, subprocess_env) as process:
            said, _ = process.communicate()
        assert process.returncode == 0, said
    one, two = (
        ravel_pytree(final_arrays(tmp_path / name)["variables"]["params"])[0]
        for name in ("one", "two")
    )
    # Four steps in float32, whose products of matrices are cut up among the cores.
    assert relative(one, two) < 1e-5


@pytest.mark.slow
def test_networks_are_made_smaller_alike_each_time():
    model = ij.create_model("lenet", width=0.25)
    variables = ij.init_variables(model, jax.random.key(0), (28, 28, 1))
    images = np.random.default_rng(0).normal(size=(16, 28, 28, 1)).astype(np.float32)
    rules = ij.Budget(macs=0.5), ij.Energy(0.7), ij.Ratio(0.4), ij.Evbmf()
    options = [(ij.compress, {"ranks": rule}) for rule in rules]
    for function, settings in [*options, (ij.make_inertial, {"macs": 0.9})]:
        (first, found), (second, again) = (
            function(model, variables, **settings, calibration=images)[:2]
            for _ in range(2)
        )
        assert first == second and first.plan != model.plan
        assert_bitwise_equal(found, again)
