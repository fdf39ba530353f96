"""Exported files: the checkpoint's logits with JAX alone, and errors in one line."""

import ast
import functools
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inertia_jax as ij
from inertia_jax import atomic
from inertia_jax.deploy import exported
from inertia_jax.metadata import Metadata, Preprocessing
from inertia_jax.models.create import abstract_variables
from train.__main__ import main
from train.data.augment import Augmentation

CLASSES = ("cat", "dog", "fox", "owl")
TILED = ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed(0.6))


def pixels(count=3, side=8):
    shape = (count, side, side, 3)
    return np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)


def make_checkpoint(path, rules=(), *, resize=None, dtype=jnp.float32):
    """A checkpoint of a network whose BatchNorm is not as at its start."""
    model = ij.create_model(
        "resnet20", num_classes=4, width=0.2, plan=ij.Plan(rules), dtype=dtype
    )
    shapes = abstract_variables(model, (8, 8, 3))
    rng = np.random.default_rng(1)

    def draw(shape):
        # Of kernels, so that no layer's outputs vanish or explode.
        scale = np.prod(shape.shape[:-1]) ** -0.5 if len(shape.shape) > 1 else 1
        return (scale * rng.uniform(-1.5, 1.5, shape.shape)).astype(shape.dtype)

    variables = jax.tree.map(draw, shapes)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    if "thresholds" in variables:
        variables["thresholds"] = jax.tree.map(
            lambda t: np.full_like(t, 0.6), variables["thresholds"]
        )
    preprocessing = Preprocessing((8, 8, 3), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), resize)
    ij.save_checkpoint(
        path, model, variables, metadata=Metadata(preprocessing, CLASSES)
    )
    return path


@functools.cache
def network_of(checkpoint):
    model, variables = ij.load_checkpoint(checkpoint)
    model = model.clone(plan=model.plan.without_ladders())  # sooner compiled
    return jax.jit(lambda images: model.apply(variables, images))


def logits(checkpoint, images):
    """What the checkpoint's own network and preprocessing give."""
    if images.dtype == np.uint8:
        metadata = ij.metadata.load_metadata(checkpoint)
        augmentation = Augmentation.plain(metadata.preprocessing, np.float32)
        images = augmentation.for_evaluation(jnp.asarray(images))
    return network_of(checkpoint)(images)


def assert_close(found, expected, tolerance=1e-5):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "checkpoint")


@pytest.fixture(scope="module")
def file(checkpoint, tmp_path_factory):
    """The checkpoint's export, with every default."""
    out = tmp_path_factory.mktemp("exported") / "network.ijx"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_any_number_of_raw_pixels_gives_the_checkpoints_logits(checkpoint, file):
    network = ij.load_exported(file)
    assert network.input_shape == (None, 8, 8, 3)
    assert network.input_dtype == np.uint8
    assert network.class_names == CLASSES
    assert network.platforms == ("cpu", "cuda", "tpu")
    assert network.info["checkpoint"] == str(checkpoint)
    assert network.info["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    images = pixels(5)
    expected = logits(checkpoint, images)
    assert np.asarray(expected).std() > 1e-3
    for count in (5, 2):
        found = network(images[:count])
        assert found.dtype == jnp.float32
        assert_close(found, expected[:count])
    assert_close(jax.jit(lambda x: 2 * network.function(x))(images), 2 * expected)


@pytest.mark.slow
def test_the_command_says_what_it_did(checkpoint, tmp_path, capsys):
    out = tmp_path / "network.ijx"
    arguments = ["--input", "float32", "--batch-size", "2", "--platforms", "cpu"]
    assert main(["export", str(checkpoint), "--out", str(out), *arguments]) == 0
    said = capsys.readouterr().out
    assert "folded      19 BatchNorm layers" in said
    assert f"{out.stat().st_size / 1e6:.1f} MB" in said
    difference = float(re.search(r"largest difference .* ([\d.e-]+) \(of", said)[1])
    assert difference < 1e-4
    assert "the same class on 2 of 2 random images" in said
    # The example that it prints is a program.
    images = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
    example = said[said.index("    import inertia_jax") :]
    names = {"images": images}
    for part in example.split("\n\n"):
        exec("\n".join(line.strip() for line in part.splitlines()), names)
        assert_close(names.pop("logits"), logits(checkpoint, images))


RUN_ALONE = """
import sys, zipfile
for name in ("flax", "inertia_jax", "train", "optax", "orbax"):
    sys.modules[name] = None  # importing it raises
import jax.export, numpy as np
file, images, out = sys.argv[1:]
archive = zipfile.ZipFile(file)
network = jax.export.deserialize(archive.read("network"))
np.save(out, network.call(np.load(images)))
"""


@pytest.mark.slow
def test_the_file_runs_with_jax_alone(checkpoint, file, tmp_path, subprocess_env):
    images = pixels(4)
    np.save(tmp_path / "images.npy", images)
    arguments = [file, tmp_path / "images.npy", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", RUN_ALONE, *map(str, arguments)]
    env = {k: v for k, v in subprocess_env.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "logits.npy"), logits(checkpoint, images))
    # Nor does the reader itself need more, or the one module of ours that it imports.
    alone = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    ours = imported_by(exported) - alone
    assert ours == {"inertia_jax.atomic"}
    assert imported_by(atomic) <= alone


def imported_by(module):
    """Returns the modules that one imports: ours in full, of others the package.

    What a function imports when it is called, as that which writes does, is left out.
    """
    names = set()
    for node in ast.parse(pathlib.Path(module.__file__).read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {n if n.startswith("inertia_jax") else n.split(".")[0] for n in names}


@pytest.mark.slow
def test_folding_is_an_option_and_shows_in_the_file(checkpoint, file, tmp_path):
    out, options = tmp_path / "network.ijx", ["--no-fold", "--platforms", "tpu"]
    assert main(["export", str(checkpoint), "--out", str(out), *options]) == 0

    def norms(path):
        network = zipfile.ZipFile(path).read("network")
        module = jax.export.deserialize(bytearray(network)).mlir_module()
        return module.count("stablehlo.rsqrt")

    assert (norms(file), norms(out)) == (0, 19)


@pytest.mark.slow
def test_resizing_happens_inside(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", resize=12)
    for name, options, shape in (
        ("own", [], (12, 12)),
        ("given", ["--image-size", "20", "14"], (20, 14)),
    ):
        out = tmp_path / name
        assert main(["export", str(checkpoint), "--out", str(out), *options]) == 0
        network = ij.load_exported(out)
        assert network.input_shape == (None, *shape, 3)
        images = pixels(2, 20)[:, : shape[0], : shape[1]]
        assert_close(network(images), logits(checkpoint, images))


@pytest.mark.slow
def test_bfloat16_halves_the_file(checkpoint, file, tmp_path):
    out = tmp_path / "network.ijx"
    arguments = ["--dtype", "bfloat16", "--out", str(out)]
    assert main(["export", str(checkpoint), *arguments]) == 0
    found, expected = (ij.load_exported(f)(pixels()) for f in (out, file))
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    model, variables = ij.load_checkpoint(checkpoint)
    folded = ij.fold_batch_norm(model, variables)[1]["params"]
    leaves = jax.tree.leaves_with_path(folded)
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    saved = file.stat().st_size - out.stat().st_size
    assert saved == pytest.approx(2 * kernels, rel=0.1)


@pytest.mark.slow
def test_inertial_and_compressed_networks(tmp_path, capsys):
    rules = (("layer1_0/conv1", TILED), ("layer2*conv1", ij.Tucker2(2, 2)))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", rules)
    out = tmp_path / "network.ijx"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "e.g. --batch-size 64" in error
    assert "tiled inertial layers" in error
    assert error.count("error:") == error.count("\n") - 1 == 1  # after `reading`
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert main(["export", str(checkpoint), "--out", str(out), "--batch-size=3"]) == 0
    network = ij.load_exported(out)
    assert network.input_shape == (3, 8, 8, 3)
    assert_close(network(pixels(3)), logits(checkpoint, pixels(3)))
    with pytest.raises(ValueError, match=r"`images` .* must be \[3, 8, 8, 3\]"):
        network(pixels(2))


def test_what_is_no_batch_norm_of_a_convolution_is_named(tmp_path, capsys):
    window = ij.Inertial(1, 3, combine="stack", threshold=ij.Fixed(0.6))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", (("layer2_1*", window),))
    arguments = ["--out", str(tmp_path / "out"), "--platforms", "tpu"]
    assert main(["export", str(checkpoint), *arguments]) == 0
    said = capsys.readouterr().out
    assert "folded      17 BatchNorm layers" in said
    assert "layer2_1/bn1 stays: it follows combine='stack'" in said
    assert "not compared" in said
    with pytest.raises(ValueError, match="exported for .*tpu"):
        ij.load_exported(tmp_path / "out")(pixels())


@pytest.mark.slow
def test_errors_of_the_command(checkpoint, file, tmp_path, capsys):
    there = tmp_path / "there"
    there.write_bytes(b"mine")
    with jax.enable_x64(True):
        double = make_checkpoint(tmp_path / "double", dtype=jnp.float64)
    new = tmp_path / "new"
    before = sorted(tmp_path.iterdir())
    for arguments, said in (
        ([checkpoint, "--out", there], r"`out` \(=.*there\) must not exist"),
        ([tmp_path / "none", "--out", new], "there is no checkpoint at .*none"),
        ([checkpoint, "--out", new, "--platforms", "gpu"], r"some of cpu, cuda"),
        ([checkpoint, "--out", new, "--platforms"], r"`platforms` .* must be some of"),
        ([checkpoint, "--out", new, "--batch-size", "0"], "`batch_size` .* >= 1"),
        (
            [checkpoint, "--out", new, "--input=float32", "--image-size", "9", "9"],
            "`image_size` .* must go with `input`",
        ),
        ([checkpoint, "--out", new, "--image-size", "0", "9"], "`image_size` .* >= 1"),
        ([double, "--out", new], "float64; `dtype` must be"),
        ([checkpoint, "--out", there / "below"], "Not a directory|exists"),
    ):
        assert main(["export", *map(str, arguments)]) == 2, arguments
        error = capsys.readouterr().err
        assert re.fullmatch(f"(reading .*\n)?error: .*({said}).*\n", error), error
        assert sorted(tmp_path.iterdir()) == before
    assert there.read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    metadata = checkpoint / "metadata.json"
    metadata.write_text(metadata.read_text().replace("0.4", "0.3"))
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 2
    assert "damaged: metadata.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "file"
    ij.save_exported(path, lambda x: x.mean((1, 2)), image_shape=(8, 8, 3))
    return path


def test_an_altered_file_is_noticed(file, tmp_path):
    content = file.read_bytes()
    other = tmp_path / "other"
    rng = np.random.default_rng(0)
    for place in [0, len(content) - 1, *rng.integers(len(content), size=30)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        other.write_bytes(flipped)
        with pytest.raises(ij.ExportDamagedError, match="SHA-256"):
            ij.load_exported(other)
    for part in (b"", content[:50], content[:-1], content[1:], b"text" * 100):
        other.write_bytes(part)
        with pytest.raises(ij.ExportDamagedError):
            ij.load_exported(other)
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no exported network at"):
            ij.load_exported(place)


def _is_compressed(archive, members):
    for name, content in members.items():
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def _has_no_program(archive, members):
    archive.writestr("metadata.json", members["metadata.json"])


def _has_another_name(archive, members):
    _has()(archive, members)
    archive.fp.seek(26)  # where the first member's header has the length of its name
    archive.fp.write(b"\xff\xff")
    archive.fp.seek(archive.start_dir)


def _is_deep(archive, members):
    archive.writestr("network", members["network"])
    archive.writestr("metadata.json", "[" * 100_000)


def _has(**fields):
    def write(archive, members):
        told = json.loads(members["metadata.json"]) | fields
        archive.writestr("network", members["network"])
        archive.writestr("metadata.json", json.dumps(told))

    return write


def _program_is(alter):
    def write(archive, members):
        archive.writestr("network", alter(members["network"]))
        archive.writestr("metadata.json", members["metadata.json"])

    return write


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_is_compressed, "stored without compression"),
        (_has_no_program, "no item named 'network'"),
        (_is_deep, "is no exported network"),
        (_has(info=[1]), "`info` of its metadata is of another kind"),
        (_has(class_names="abc"), "`class_names` of its"),
        (_has(format="1"), "`format` of its"),
        (_has(input_dtype=5), "`input_dtype` of its"),
        (_has(input_dtype="O"), "of O"),
        (_has(input_dtype="x" * 10**4), "of xxx"),
        (_has_another_name, "File name in directory 'network' and header"),
        (_has(input_shape=[None, 9, 8, 3]), "says that its input is .None, 9"),
        (_program_is(lambda whole: whole[:100]), "a broken program"),
        (_program_is(lambda whole: whole[:8] + b"\xff" * 40), "a broken program"),
    ],
)
def test_a_file_that_somebody_made_is_checked(small_file, tmp_path, write, said):
    with zipfile.ZipFile(small_file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    other = tmp_path / "other"
    with zipfile.ZipFile(other, "w") as archive:
        write(archive, members)
        archive.comment = b"0" * 64
    content = other.read_bytes()[:-64]
    other.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(ij.ExportDamagedError, match=said) as caught:
        ij.load_exported(other)
    assert len(str(caught.value)) < 1000


def test_what_is_no_archive_is_said_so(tmp_path):
    content = b"no archive" * 50
    (tmp_path / "x").write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(ij.ExportDamagedError, match="not a zip file"):
        ij.load_exported(tmp_path / "x")


@pytest.mark.usefixtures("no_shape_checks")
def test_images_that_do_not_fit_are_refused(file):
    network = ij.load_exported(file)
    for images, said in (
        (pixels(2, 9), r"must be \[n >= 1, 8, 8, 3\]"),
        (pixels(0), r"must be \[n >= 1"),
        (pixels(1)[0], r"shape \(8, 8, 3\)"),
        (pixels().astype(np.float32), "must be of type uint8"),
    ):
        with pytest.raises(ValueError, match=said):
            network(images)


def test_any_function_of_images_can_be_saved(tmp_path, monkeypatch):
    weights = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = tmp_path / "below" / "network"
    save = lambda path=path, **options: ij.save_exported(  # noqa: E731
        path, lambda x: x.mean((1, 2)) @ weights, image_shape=(4, 5, 3), **options
    )
    save(info={"made": "by hand"}, platforms=("cpu", "rocm"))
    network = ij.load_exported(path)
    images = np.random.default_rng(0).normal(size=(7, 4, 5, 3)).astype(np.float32)
    assert_close(network(images), images.mean((1, 2)) @ weights)
    assert network.info == {"made": "by hand"}
    with pytest.raises(FileExistsError, match="left as it is|left as it was"):
        save()
    with pytest.raises(ValueError, match="`platforms` .* some of"):
        save(tmp_path / "new", platforms=("cpu", "cpu"))
    monkeypatch.setattr(exported, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match="must be at most 100"):
        save(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["below", "network"]


def test_a_function_that_needs_the_number_of_images_is_told_how_to_say_it(tmp_path):
    def flat(images):
        return images.reshape(len(images), -1)

    with pytest.raises(ValueError, match="`batch_size` .* `images.shape.0.` would do"):
        ij.save_exported(tmp_path / "a.ijx", flat, image_shape=(2, 2, 1))
    with pytest.raises(TypeError, match="'NoneType'"):
        ij.save_exported(tmp_path / "a.ijx", lambda x: x + None, image_shape=(2, 2, 1))
    ij.save_exported(tmp_path / "a.ijx", flat, image_shape=(2, 2, 1), batch_size=3)


def test_a_file_of_another_version_says_so(file, tmp_path, monkeypatch):
    def refuse(_):
        raise ValueError("calling convention version 99")

    with monkeypatch.context() as patch:
        patch.setattr(exported.export, "deserialize", refuse)
        with pytest.raises(ValueError, match=f"by jax {jax.__version__}.*version 99"):
            ij.load_exported(file)
    other = tmp_path / "other"
    monkeypatch.setattr(exported, "_FORMAT", 2)
    ij.save_exported(other, lambda x: x.mean((1, 2)), image_shape=(1, 1, 1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 2; must be 1"):
        ij.load_exported(other)
    assert json.loads(zipfile.ZipFile(other).read("metadata.json"))["format"] == 2


def test_what_a_file_says_is_what_its_reader_takes(tmp_path, no_shape_checks):
    save = functools.partial(
        ij.save_exported, function=lambda x: x.mean((1, 2)), image_shape=(8, 8, 3)
    )
    with pytest.raises(ValueError, match="`class_names` has 0; each must be a str"):
        save(tmp_path / "a.ijx", class_names=range(3))
    assert not (tmp_path / "a.ijx").exists()
    save(tmp_path / "a.ijx", info={"curve": np.arange(2.0), "top1": jnp.float32(0.5)})
    found = ij.load_exported(tmp_path / "a.ijx").info
    assert found == {"curve": [0.0, 1.0], "top1": 0.5}
