"""Networks in other programs compute what they compute in JAX."""

import sys

import jax
import numpy as np
import pytest

import inertia_jax as ij
from train.benchmark.runtimes import runtime_call
from train.errors import UsageError


@pytest.fixture(scope="module")
def lenet():
    model = ij.create_model("lenet")
    return model, jax.tree.map(np.asarray, ij.init_variables(model, jax.random.key(0)))


IMAGES = np.random.default_rng(0).normal(size=(1, 28, 28, 1)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "package"),
    [("torch", "torch"), ("onnx", "onnxruntime"), ("openvino", "openvino")],
)
@pytest.mark.filterwarnings("default")  # of those programs
def test_logits_are_those_of_jax(lenet, runtime, package):
    for name in ("torch", "onnxscript", package):
        pytest.importorskip(name)
    model, variables = lenet
    expected = np.asarray(jax.jit(lambda x: model.apply(variables, x))(IMAGES))
    found = runtime_call(runtime, model.apply, variables, IMAGES)()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_a_missing_program_is_named(lenet, monkeypatch):
    for runtime, package in (
        ("torch", "torch"),
        ("onnx", "onnx"),
        ("openvino", "openvino"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"needs {package}: .*'.\[{runtime}\]'"):
            runtime_call(runtime, lenet[0].apply, lenet[1], IMAGES)
