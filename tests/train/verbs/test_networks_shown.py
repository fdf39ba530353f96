"""The verbs that show networks: models, plan, diff, predict."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import save_bright_digits
from PIL import Image

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.side_by_side import compare_variables

pytestmark = pytest.mark.usefixtures("one_device")

NAMES = tuple("abcdefghij")
SEEN = Preprocessing((28, 28, 1), (0.5,), (0.25,))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a LeNet, one with other numbers, and one of Tucker-2 factors."""
    folder = tmp_path_factory.mktemp("networks")
    model = ij.create_model("lenet", width=0.2)
    variables = ij.init_variables(model, jax.random.key(0))
    info = {"config": {"data": {"source": "digits"}}}
    metadata = Metadata(SEEN, NAMES, info)
    ij.save_checkpoint(folder / "one", model, variables, metadata=metadata)
    kernel = variables["params"]["fc2"]["kernel"]
    changed = {"params": {**variables["params"], "fc2": {**variables["params"]["fc2"]}}}
    changed["params"]["fc2"]["kernel"] = kernel.at[0, 0].add(3.0)
    ij.save_checkpoint(folder / "other", model, changed, metadata=metadata)
    small = ij.compress(model, variables, ranks=ij.Ratio(0.5), image_shape=(28, 28, 1))
    ij.save_checkpoint(folder / "small", *small, metadata=metadata)
    return folder


def printed(capsys, *words):
    """Returns the one object that a verb prints with --json."""
    assert main([*map(str, words), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.slow
def test_every_network_is_listed_with_its_cost(capsys):
    found = printed(capsys, "models", "--num-classes", "7")
    assert [one["name"] for one in found["models"]] == list(ij.MODEL_NAMES)
    for one in found["models"][:3]:
        model = ij.create_model(one["name"], num_classes=7)
        shapes = jax.eval_shape(
            lambda m=model, s=one["input_shape"]: ij.init_variables(
                m, jax.random.key(0), tuple(s)
            )
        )
        sizes = [leaf.size for leaf in jax.tree.leaves(shapes["params"])]
        assert one["params"] == sum(sizes)
        assert one["macs"] == sum(layer["macs"] for layer in one["layers"])


def test_the_layers_of_one_network_are_shown(capsys):
    assert main(["models", "resnet20", "--width", "0.25"]) == 0
    model = ij.create_model("resnet20", width=0.25)
    assert capsys.readouterr().out == f"{ij.count_cost(model, (32, 32, 3))}\n"
    for words, said in (
        (["resent18"], "Did you mean resnet18?"),
        (["--stem", "imagenet"], "`stem` (=imagenet) does nothing without a NAME"),
        (["--width", "-1"], "`width` (=-1.0)"),
    ):
        assert main(["models", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_plan_is_shown_and_written_as_compress_takes_it(networks, capsys, tmp_path):
    out = tmp_path / "plan.json"
    found = printed(capsys, "plan", networks / "small", "--out", out)
    model, _ = ij.load_checkpoint(networks / "small")
    plan = ij.Plan.from_json(out.read_text())
    assert plan == model.plan and plan.rules
    assert ij.Plan.from_json(json.dumps(found["plan"])) == plan
    cost = ij.count_cost(model, (28, 28, 1))
    assert found["cost"]["macs"] == cost.macs
    assert [row["path"] for row in found["layers"]] == [row.path for row in cost.rows]
    assert main(["plan", str(networks / "one")]) == 0
    said = capsys.readouterr().out
    assert "lenet, width 0.2" in said and "every layer Conv()" in said


def test_what_two_checkpoints_differ_in_is_said(networks, capsys, tmp_path):
    found = printed(capsys, "diff", networks / "one", networks / "other")
    assert not found["description"] and not found["layers"]
    (row,) = found["variables"]
    assert row["path"] == "params/fc2/kernel"
    assert row["largest"] == pytest.approx(3.0, rel=1e-6)
    _, variables = ij.load_checkpoint(networks / "one")
    norm = float(jnp.linalg.norm(variables["params"]["fc2"]["kernel"]))
    assert row["relative"] == pytest.approx(3.0 / norm, rel=1e-5)

    found = printed(capsys, "diff", networks / "one", networks / "small")
    paths = [layer["path"] for layer in found["layers"]]
    model, _ = ij.load_checkpoint(networks / "small")
    assert set(paths) == {glob for glob, _ in model.plan.rules}
    assert {layer["second"]["kind"] for layer in found["layers"]} == {"tucker2"}
    assert found["costs"][1]["macs"] < found["costs"][0]["macs"]

    assert main(["diff", str(networks / "one"), str(networks / "one")]) == 0
    assert "variables are the same" in capsys.readouterr().out
    assert main(["diff", str(networks / "one"), str(networks / "small")]) == 0
    said = capsys.readouterr().out
    assert "tucker2" in said and "are in the second alone" in said


@pytest.mark.slow
def test_answers_of_two_checkpoints_are_compared(networks, capsys, tmp_path):
    source = save_bright_digits(tmp_path / "set.npz", 10, 40, 28)
    words = ["diff", networks / "one", networks / "other", "--data", source]
    answers = printed(capsys, *words)["answers"]
    test = np.load(tmp_path / "set.npz")
    images = (test["x_test"] / 255 - 0.5) / 0.25
    guesses = []
    for name in ("one", "other"):
        model, variables = ij.load_checkpoint(networks / name)
        guesses.append(model.apply(variables, images.astype("f")).argmax(-1))
    expected = np.flatnonzero(guesses[0] != guesses[1])
    assert len(expected) > 0
    assert answers["indices"] == expected.tolist()
    assert answers["num_differing"] == sum(c["count"] for c in answers["changes"])
    right = [guess == test["y_test"] for guess in guesses]
    assert answers["only_first_right"] == (right[0] & ~right[1]).sum()
    assert main([str(word) for word in words]) == 0
    assert f"{len(expected)} of 40 answers differ" in capsys.readouterr().out


def test_variables_are_compared_by_value():
    zeros, nan = np.zeros(2), np.array([np.nan, 1.0])
    first = {"a": zeros, "b": nan, "c": np.ones(2), "d": np.ones(3), "e": zeros}
    second = {"a": zeros + 1, "b": nan, "c": np.array([1, np.nan]), "d": np.ones(2)}
    rows = {row["path"]: row for row in compare_variables(first, second)}
    assert set(rows) == {"a", "c", "d", "e"}
    assert rows["a"]["largest"] == 1.0 and np.isinf(rows["a"]["relative"])
    assert np.isinf(rows["c"]["largest"])
    assert rows["d"]["shapes"] == [(3,), (2,)] and rows["d"]["relative"] is None
    assert rows["e"]["shapes"] == [(2,), None]


def test_images_are_classified_as_evaluation_sees_them(networks, capsys, tmp_path):
    rng = np.random.default_rng(0)
    files, expected = [], []
    model, variables = ij.load_checkpoint(networks / "one")
    for index in range(3):
        pixels = rng.integers(256, size=(28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        files.append(tmp_path / f"{index}.png")
        x = ((pixels / 255 - 0.5) / 0.25).astype("f")[None, :, :, None]
        expected.append(np.asarray(jax.nn.softmax(model.apply(variables, x)))[0])
    words = ["predict", networks / "one", *files, "--top", "3", "--batch-size", "2"]
    found = printed(capsys, *words)
    assert [one["image"] for one in found["images"]] == list(map(str, files))
    for one, row in zip(found["images"], expected, strict=True):
        order = np.argsort(-row)[:3]
        assert [c["index"] for c in one["classes"]] == order.tolist()
        assert [c["class"] for c in one["classes"]] == [NAMES[i] for i in order]
        got = [c["probability"] for c in one["classes"]]
        np.testing.assert_allclose(got, row[order], rtol=1e-4)  # float32 logits
    # A colour image of another size becomes grey and covers the input.
    Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8)).save(
        tmp_path / "wide.png"
    )
    assert main(["predict", str(networks / "one"), str(tmp_path / "wide.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'wide.png'}\n")


def test_an_image_that_cannot_be_read_is_one_error(networks, capsys, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    for file, said in (
        (bad, f"cannot read {bad}: no image that Pillow knows."),
        (tmp_path / "none.png", f"there is no image at {tmp_path / 'none.png'}."),
        (tmp_path, f"there is no image at {tmp_path}."),
    ):
        assert main(["predict", str(networks / "one"), str(file)]) == 2
        (line,) = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.startswith("reading")
        ]
        assert line == f"error: {said}"
    assert main(["predict", str(networks / "one"), "x", "--top", "0"]) == 2
    assert "`top` (=0) must be >= 1." in capsys.readouterr().err
