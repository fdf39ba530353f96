"""Flip tests: the mean of the answers to an image and to its mirror image."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import PREPROCESSING, SHAPE

import inertia_jax as ij
from inertia_jax.metadata import Metadata
from train.__main__ import main
from train.evaluate.evaluation import Evaluation
from train.step.train_step import gate_rates

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flip_test_is_the_mean_by_hand(dtype, tmp_path):
    spec = ij.Inertial(1, 4, threshold=ij.Fixed(0.4))
    plan = ij.Plan((("conv2", spec),))
    model = ij.create_model("lenet", width=0.2, plan=plan, dtype=dtype)
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)
    path, out = tmp_path / "checkpoint", tmp_path / "evaluation.json"
    classes = tuple(map(str, range(10)))
    ij.save_checkpoint(
        path, model, variables, metadata=Metadata(PREPROCESSING, classes)
    )
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(23, *SHAPE), dtype=np.uint8)
    labels = rng.integers(10, size=23)
    np.savez(tmp_path / "set.npz", x_test=images, y_test=labels)
    options = ["--data", f"npz:{tmp_path / 'set.npz'}", "--batch-size", "10"]
    assert (
        main(["evaluate", str(path), *options, "--flip-test", "--out", str(out)]) == 0
    )
    found = json.loads(out.read_text())

    inputs = ((images / 255 - 0.5) / 0.25).astype(np.float32)
    logits, rates = [], []
    for seen in (inputs, inputs[:, :, ::-1]):
        answers, sown = model.apply(
            variables, seen.astype(model.dtype), mutable=["intermediates"]
        )
        logits.append(np.asarray(answers, np.float64))
        rates.append(np.asarray(gate_rates(sown["intermediates"])["conv2"]).mean())
    mean = np.mean(logits, axis=0)
    losses = np.log(np.exp(mean).sum(-1)) - mean[np.arange(23), labels]
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=tolerance)
    np.testing.assert_allclose(found["gate_rate/conv2"], np.mean(rates), rtol=tolerance)
    if dtype == "float32":
        np.testing.assert_allclose(found["top1"], (mean.argmax(-1) == labels).mean())
        # One of the two alone is something else.
        assert abs(logits[0] - mean).max() > 1e-3 and rates[0] != rates[1]


def test_an_evaluation_prints_its_gates_and_its_confusion():
    confusion = np.array([[99, 1, 0], [0, 0, 0], [25, 0, 75]])
    found = Evaluation(
        num_examples=200,
        loss=0.25,
        top1=0.87,
        top5=1.0,
        confusion=confusion,
        class_names=("cat", "giraffe", "ox"),
        gate_rates={"conv1": 0.5, "layer1/conv": 0.125},
        right=np.repeat([True, False], [174, 26]),
    )
    expected = """\
top-1      87.00%  (174 of 200)
top-5     100.00%
loss       0.2500

Open gates by layer
  conv1        0.500
  layer1/conv  0.125

Accuracy by class, and confusion matrix (rows: truth, columns: answer)
  cat      99.00%  99  1   0
  giraffe    nan%   0  0   0
  ox       75.00%  25  0  75"""
    assert str(found) == expected
    many = dataclasses.replace(
        found,
        class_names=tuple("abcdefghijklmnopqrstu"),
        confusion=np.eye(21, dtype=int),
    )
    assert str(many).splitlines()[8:10] == ["Accuracy by class", "  a  100.00%"]
