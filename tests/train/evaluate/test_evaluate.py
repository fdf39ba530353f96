"""Flip tests: the mean of the answers to an image and to its mirror image."""

import dataclasses
import json
import shlex

import jax
import numpy as np
import pytest
from helpers import PREPROCESSING, SHAPE
from PIL import Image

import inertia_jax as ij
from inertia_jax.metadata import Metadata
from train.__main__ import main
from train.data import ImageSet, Split
from train.evaluate.evaluation import Evaluation
from train.fit.loop import FitResult, summary
from train.machine.processes import warn
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
        predictions=np.repeat([0, 1, 2], [124, 1, 75]),
    )
    expected = """\
top-1      87.00%  (174 of 200)
loss       0.2500

Open gates by layer
  conv1        0.500
  layer1/conv  0.125

Accuracy by class, and confusion matrix (rows: truth, columns: answer)
  cat  99.00%  99  1   0
  ox   75.00%  25  0  75
without images: giraffe"""
    assert str(found) == expected
    many = dataclasses.replace(
        found,
        class_names=tuple("abcdefghijklmnopqrstu"),
        confusion=np.eye(21, dtype=int),
    )
    assert str(many).splitlines()[1] == "top-5     100.00%"
    assert str(many).splitlines()[8:10] == ["Accuracy by class", "  a  100.00%"]
    few = dataclasses.replace(many, confusion=np.diag([1, *[0] * 20]))
    assert str(few).splitlines()[-2:] == [
        "  a  100.00%",
        "without images: b, c, d, e, f and 15 more",
    ]


def save_network(path, *, names=(), num_classes=10):
    model = ij.create_model("lenet", width=0.1, num_classes=num_classes)
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)
    ij.save_checkpoint(
        path, model, variables, metadata=Metadata(PREPROCESSING, tuple(names))
    )
    return str(path)


def save_images(path, labels, **arrays):
    images = np.random.default_rng(0).integers(256, size=(len(labels), *SHAPE))
    np.savez(path, x_test=images.astype(np.uint8), y_test=labels, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize("names", [(), "abcdefghij", "abxdefghij"])
def test_another_number_of_classes_is_said(names, tmp_path, capsys):
    checkpoint = save_network(tmp_path / "checkpoint", names=names)
    warn.cache_clear()
    source = save_images(tmp_path / "set.npz", [0, 1, 2, 1], label_names=list("abc"))
    assert main(["evaluate", checkpoint, "--data", source]) == 0
    said = capsys.readouterr()
    by_name = names == "abcdefghij"
    warning = (
        "warning: set has 3 classes, the network 10; classes are compared by their "
    )
    assert (warning in said.err) == (not by_name)
    assert ("of set are those of the network by their names" in said.err) == by_name
    differs = "label 2 is 'c' in set and 'x' in the checkpoint" in said.err
    assert differs == (names == "abxdefghij")
    assert "nan" not in said.out and "without images: " in said.out
    rows = said.out.split("answer)\n")[1].splitlines()
    assert [row.split()[0] for row in rows[:-1]] == ["a", "b", names[2:3] or "c"]
    assert "top-5" in said.out


def test_classes_are_compared_by_name_where_both_have_names(tmp_path, capsys):
    checkpoint = save_network(tmp_path / "checkpoint", names="abcdefghij")
    found = {}
    for listed in ("ca", "abcdefghij", "acdefghijb"):
        labels = [listed.index(name) for name in "acca"]
        source = save_images(tmp_path / "set.npz", labels, label_names=list(listed))
        out = tmp_path / "found.json"
        arguments = ["evaluate", checkpoint, "--data", source, "--out", str(out)]
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert "warning" not in said.err
        assert ("by their names" in said.err) == (listed != "abcdefghij")
        found[listed] = json.loads(out.read_text())
    assert np.sum(found["ca"]["confusion"], 1).tolist() == [2, 0, 2, *[0] * 7]
    assert found["ca"] == found["abcdefghij"] == found["acdefghijb"]


def test_names_that_do_not_tell_the_classes_leave_the_numbers():
    split = Split(np.zeros((3, *SHAPE), np.uint8), np.array([0, 1, 1], np.int32))
    data = ImageSet("set", split, split, ("b", "a"))
    renumbered = data.with_classes(("a", "x", "b"))
    assert renumbered.train.labels.tolist() == [2, 0, 0]
    assert renumbered.test.labels.tolist() == [2, 0, 0]
    assert renumbered.class_names == ("a", "x", "b")
    for theirs in ((), ("a", "c"), ("a", "b", "b"), ("0", "1")):
        assert data.with_classes(theirs) is None
    unnamed = dataclasses.replace(data, class_names=("0", "1"))
    assert unnamed.with_classes(("0", "1", "2")) is None


@pytest.mark.parametrize(("num_classes", "shown"), [(3, False), (5, False), (6, True)])
def test_top_5_is_for_more_than_five_classes(num_classes, shown, tmp_path, capsys):
    checkpoint = save_network(tmp_path / "checkpoint", num_classes=num_classes)
    warn.cache_clear()
    source = save_images(tmp_path / "set.npz", np.arange(num_classes))
    assert main(["evaluate", checkpoint, "--data", source]) == 0
    said = capsys.readouterr()
    assert ("top-5" in said.out) == shown
    assert "warning" not in said.err


def test_advice_names_options_that_the_command_has(tmp_path, capsys):
    checkpoint = save_network(tmp_path / "checkpoint")
    for split in ("train", "test"):
        for label, size in ((0, 8), (1, 9)):
            place = tmp_path / "images" / split / str(label)
            place.mkdir(parents=True)
            Image.new("RGB", (size, size)).save(place / "0.png")
    folder = f"imagefolder:{tmp_path / 'images'}"
    options = ["--data", folder, "--cache-dir", str(tmp_path)]
    assert main(["evaluate", checkpoint, *options]) == 2
    assert "must be one: --resize resizes them.\n" in capsys.readouterr().err
    assert (
        main(["fit", "--data.source", folder, "--data.cache-dir", str(tmp_path)]) == 2
    )
    assert "must be one: set `data.image_size`" in capsys.readouterr().err
    # No command has all of `data.source`, `--data` and `source`.
    assert main(["evaluate", checkpoint, "--data", "folder"]) == 2
    assert "error: the source of images (='folder') must be tfds:NAME" in (
        capsys.readouterr().err
    )


def test_the_command_that_evaluates_a_run_can_be_pasted(tmp_path):
    found = Evaluation(
        num_examples=2,
        loss=0.25,
        top1=0.5,
        top5=1.0,
        confusion=np.array([[1, 0], [1, 0]]),
        class_names=("a", "b"),
        gate_rates={},
        right=np.array([True, False]),
        predictions=np.array([0, 0]),
    )
    run = tmp_path / "my runs" / "it's"
    said = summary(FitResult(run, 3, found, None)).splitlines()
    assert "top-5" not in said[0]
    assert shlex.split(said[-1])[2:] == ["-m", "train", "evaluate", str(run)]
