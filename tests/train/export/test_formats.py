"""Exports in other programs' formats: the checkpoint's logits, whole or not at all."""

import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
import safetensors.numpy

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from inertia_jax.models.create import abstract_variables
from train.__main__ import main
from train.errors import UsageError
from train.export import formats
from train.export.comparison import compare, random_input
from train.export.formats import choose_format

CLASSES = ("cat", "dog", "fox", "owl")
SHAPE = (8, 8, 3)
RULES = (
    (
        "layer1_0/conv1",
        ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed(0.6), capacities=None),
    ),
    ("layer2*conv1", ij.Tucker2(2, 2)),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = ij.create_model("resnet20", num_classes=4, width=0.2, plan=ij.Plan(RULES))
    rng = np.random.default_rng(1)

    def draw(leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 1
        return (scale * rng.uniform(-1.5, 1.5, leaf.shape)).astype(np.float32)

    variables = jax.tree.map(draw, abstract_variables(model, SHAPE))
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    variables["thresholds"] = jax.tree.map(
        lambda t: np.full_like(t, 0.6), variables["thresholds"]
    )
    preprocessing = Preprocessing(SHAPE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    evaluation = {"top1": 0.875, "gate_rate/layer1_0/conv1": 0.25}
    info = {"evaluation": evaluation, "config": {"data": {"source": "tfds:pets"}}}
    path = tmp_path_factory.mktemp("mixed") / "checkpoint"
    metadata = Metadata(preprocessing, CLASSES, info)
    ij.save_checkpoint(path, model, variables, metadata=metadata)
    return path


def export(checkpoint, out, *options):
    return main(["export", str(checkpoint), "--out", str(out), *options])


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Normalised images, and the checkpoint's logits."""
    model, variables = ij.load_checkpoint(checkpoint)
    images = np.random.default_rng(2).normal(size=(3, *SHAPE)).astype(np.float32)
    logits = np.asarray(jax.jit(lambda x: model.apply(variables, x))(images))
    assert logits.std() > 1e-2
    return images, logits


def assert_close(found, logits):
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.slow
def test_torch_is_a_folder_that_pytorch_runs(checkpoint, expected, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "pets"
    assert export(checkpoint, folder / "pets.pt", "--input", "float32") == 0
    assert "of 8 random images" in capsys.readouterr().out
    names = {"README.md", "network.py", "pets.pt"}
    assert {file.name for file in folder.iterdir()} == names
    network = runpy.run_path(str(folder / "network.py"))["Network"]()
    state = torch.load(folder / "pets.pt", weights_only=True)
    network.load_state_dict(state)
    images, logits = expected
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert_close(found.numpy(), logits)
    model, variables = ij.load_checkpoint(checkpoint)
    again = ij.load_torch(model, folder / "pets.pt", image_shape=SHAPE)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(again), variables))


@pytest.mark.slow
def test_safetensors_come_with_a_card_and_are_read_again(
    checkpoint, expected, tmp_path, capsys
):
    folder = tmp_path / "pets"
    assert export(checkpoint, folder, "--format", "safetensors") == 0
    assert "logits 0 (of" in capsys.readouterr().out
    model, variables = ij.load_checkpoint(checkpoint)
    again = ij.load_torch(model, folder / "model.safetensors", image_shape=SHAPE)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(again), variables))
    keys = safetensors.numpy.load_file(folder / "model.safetensors")
    assert "layer2.0.conv1.1.weight" in keys
    card = (folder / "README.md").read_text()
    # Friction counts, at the rate of open gates that the training measured.
    rates = {"layer1_0/conv1": 0.25}
    total_macs = ij.count_cost(model, SHAPE, gate_rates=rates).total_macs
    assert total_macs > ij.count_cost(model, SHAPE, gate_rates=rates).macs
    for said in (
        "library_name: inertia_jax",
        "| top1 on the test set | 0.875 |",
        "| trained on | `tfds:pets` |",
        "std = (0.2, 0.3, 0.4)",
        "3. owl",
        '"rank_in": 2',
        f"| parameters | {ij.count_cost(model, SHAPE).params:,} |",
        f"| multiply-accumulates an image | {total_macs:,} |",
    ):
        assert said in card, said
    # What the card says is a program.
    code = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace('"plan.json"', repr(str(folder / "plan.json")))
    weights = str(folder / "model.safetensors")
    names = {"images": expected[0]}
    exec(code.replace('"model.safetensors"', repr(weights)), names)
    assert_close(names["logits"], expected[1])


@pytest.mark.slow
def test_stablehlo_is_a_portable_artifact(checkpoint, tmp_path, capsys):
    out = tmp_path / "pets.stablehlo"
    assert export(checkpoint, out) == 2
    assert "`batch_size` (=dynamic) must be a number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert export(checkpoint, out, "--batch-size", "2") == 0
    said = capsys.readouterr().out
    assert "the same class on 2 of 2" in said and "iree-compile" in said
    content = out.read_bytes()
    assert content.startswith(b"ML\xefR") and b"StableHLO_v" in content[:64]


@pytest.mark.slow
def test_onnx_takes_any_number_of_images(checkpoint, expected, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "pets.onnx"
    assert export(checkpoint, out, "--input", "float32") == 0
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    images, logits = expected
    for count in (3, 1):
        (found,) = session.run(None, {"images": images[:count]})
        assert_close(found, logits[:count])


def altered(images):
    return lambda path, job: lambda given: 1.01 * images(path, job)(given)


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(checkpoint, tmp_path, capsys, monkeypatch):
    from train.verbs import export as verb

    for name, suffix in (("write_ijx", "ijx"), ("write_stablehlo", "stablehlo")):
        monkeypatch.setattr(verb, name, altered(getattr(formats, name)))
        options = ("--batch-size", "2", "--input", "float32")
        assert export(checkpoint, tmp_path / f"pets.{suffix}", *options) == 2
        assert "which is more than rounding. It was not" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_logits_are_compared_image_by_image():
    expected = random_input((4, 10), "float32")
    near = expected * (1 + 1e-5)
    options = {"dtype": "float32", "has_gates": False}
    assert compare(expected, near, **options).same == 4
    one_differs = near.copy()
    one_differs[2] += 0.5
    with pytest.raises(UsageError, match="differ from the checkpoint's by 0.5"):
        compare(expected, one_differs, **options)
    # A gate that rounding opens changes one image.
    assert compare(expected, one_differs, dtype="float32", has_gates=True).count == 4
    with pytest.raises(UsageError, match="not finite"):
        compare(expected, near * np.nan, **options)
    with pytest.raises(UsageError, match=r"gives \[4, 9\] logits"):
        compare(expected, near[:, :9], **options)


def test_the_suffix_says_the_format():
    for name, format_ in (
        ("a.onnx", "onnx"),
        ("a.PTH", "torch"),
        ("a", "ijx"),
        ("a.b/c.safetensors", "safetensors"),
    ):
        assert choose_format(None, pathlib.Path(name)) == format_
    assert choose_format("torch", pathlib.Path("a")) == "torch"
    with pytest.raises(UsageError, match="`format` .=onnx. must be ijx for `out`"):
        choose_format("onnx", pathlib.Path("a.ijx"))
    assert choose_format("ijx", pathlib.Path("a.v2")) == "ijx"
    with pytest.raises(UsageError, match=r"`out` .=a.onx. .* --format .*mean .onnx\?"):
        choose_format(None, pathlib.Path("a.onx"))


def test_errors_leave_nothing(checkpoint, tmp_path, capsys):
    for out, options, said in (
        ("a.onnx", ["--dtype", "bfloat16"], "`dtype` .* must be float32"),
        ("a.stablehlo", ["--platforms", "tpu"], "`platforms` .* does nothing"),
        ("a/a.pt", ["--batch-size", "2"], "`batch_size` .* does nothing in torch"),
        ("a.pt", [], r"`out` .* must be in a new folder, .*a/a.pt"),
        ("a/a.safetensors", ["--fold"], "`fold` .* must be False"),
        ("a/a.safetensors", ["--input", "float32"], "do nothing in safetensors"),
        ("a.ijx", ["--format", "torch"], "`format` .* must be ijx"),
    ):
        assert export(checkpoint, tmp_path / out, *options) == 2, (out, options)
        error = capsys.readouterr().err
        assert re.fullmatch(f"error: .*({said}).*\n", error), error
        assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    for out in ("a.onnx", "a/a.pt"):
        assert export(checkpoint, tmp_path / out) == 2
        said = capsys.readouterr().err
        assert re.search(r"needs torch: pip install '.\[(onnx|torch)\]' in the", said)
        assert list(tmp_path.iterdir()) == []
