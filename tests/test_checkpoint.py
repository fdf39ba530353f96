"""Checkpoints: whole, self-contained, and checked."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import inertia_jax as ij
from inertia_jax.checkpoint import (
    CheckpointWriteError,
    _write_error,
    load_arrays,
    verify_checkpoint,
)
from inertia_jax.metadata import (
    Metadata,
    Preprocessing,
    both_sides,
    load_description,
    load_metadata,
)
from train.config import Data
from train.errors import UsageError

PREPROCESSING = Preprocessing((32, 32, 3), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 40)


@pytest.fixture
def saved(tmp_path):
    plan = ij.Plan((("layer1*", ij.Conv()),))
    model = ij.create_model(
        "resnet20", width=0.25, num_classes=3, shortcut="B", plan=plan
    )
    variables = ij.init_variables(model, jax.random.key(0))
    metadata = Metadata(PREPROCESSING, ("a", "b", "c"), {"step": 7})
    training = {"step": np.int32(7), "opt_state": {"0": {}, "1": {"m": np.ones(3)}}}
    path = tmp_path / "checkpoint"
    ij.save_checkpoint(path, model, variables, metadata=metadata, training=training)
    return path, model, variables


@pytest.mark.slow
def test_a_checkpoint_rebuilds_model_and_variables(saved):
    path, model, variables = saved
    loaded_model, loaded = ij.load_checkpoint(path)
    assert loaded_model == model
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))
    metadata = load_metadata(path)
    assert metadata == Metadata(PREPROCESSING, ("a", "b", "c"), {"step": 7})
    training = load_arrays(path)["training"]
    assert int(training["step"]) == 7
    np.testing.assert_array_equal(training["opt_state"]["1"]["m"], np.ones(3))


def test_frozen_and_boxed_variables_are_stored_and_exported_plain(tmp_path):
    model = ij.create_model("lenet", width=0.1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 28, 28, 1)))
    plain = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    boxed = freeze(jax.tree.map(lambda leaf: nn.Partitioned(leaf, ()), plain))
    ij.save_checkpoint(tmp_path / "checkpoint", model, boxed)
    _, loaded = ij.load_checkpoint(tmp_path / "checkpoint")
    jax.tree.map(np.testing.assert_array_equal, loaded, plain)
    states = [ij.to_torch(model, variables) for variables in (boxed, plain)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_any_flipped_bit_is_noticed(saved):
    path, _, _ = saved
    rng = np.random.default_rng(0)
    files = [file for file in sorted(path.rglob("*")) if file.stat().st_size]
    files = [file for file in files if file.is_file()]
    assert any(file.parent.name == "d" for file in files)  # orbax's own data
    for file in files:
        content = bytearray(file.read_bytes())
        place = rng.integers(len(content))
        content[place] ^= 1 << rng.integers(8)
        original = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ij.CheckpointDamagedError, match="damaged"):
            ij.load_checkpoint(path)
        file.write_bytes(original)
    ij.load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["missing", "surplus", "no manifest"])
def test_missing_and_surplus_files_are_noticed(saved, change):
    path, _, _ = saved
    if change == "missing":
        next((path / "arrays" / "d").iterdir()).unlink()
    elif change == "surplus":
        (path / "arrays" / "more").write_text("x")
    else:
        (path / "manifest.json").unlink()
    with pytest.raises(ij.CheckpointDamagedError):
        ij.load_checkpoint(path)


def test_a_run_is_read_by_its_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = ij.create_model("lenet", width=0.05)
    first = ij.init_variables(model, jax.random.key(0), (8, 8, 1))
    for step, top1 in ((10, 0.5), (20, 0.9), (30, 0.7), (35, None)):
        variables = jax.tree.map(lambda leaf, step=step: leaf + step, first)
        evaluation = {"evaluation": top1 and {"top1": top1}}
        path = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        metadata = Metadata(None, (), {"step": step, **evaluation})
        ij.save_checkpoint(path, model, variables, metadata=metadata)
    checkpoints = tmp_path / "run" / "checkpoints"
    for place in (
        tmp_path / "run",
        checkpoints,
        "~/run",
        checkpoints / "step_00000020",
    ):
        loaded_model, loaded = ij.load_checkpoint(place)
        assert loaded_model == model
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b + 20), loaded, first
        )
        assert ij.load_metadata(place).info["step"] == 20
    # Without an evaluation it is the latest; one that is named is taken as it is.
    assert ij.load_metadata(checkpoints / "step_00000035").info["step"] == 35
    for step in (10, 20, 30):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    assert ij.load_metadata("~/run").info["step"] == 35
    for read in (ij.load_checkpoint, ij.load_metadata):
        with pytest.raises(FileNotFoundError, match="and no run that has one"):
            read(tmp_path / "nothing")


def test_nothing_is_overwritten(saved):
    path, model, variables = saved
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match="must not exist"):
        ij.save_checkpoint(path, model, variables)
    assert (path / "manifest.json").read_bytes() == before


def test_a_failed_write_leaves_nothing(saved, monkeypatch):
    path, model, variables = saved

    def fail(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", fail)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        ij.save_checkpoint(path.parent / "other", model, variables)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]


def test_a_failed_read_is_not_damage(saved, monkeypatch):
    path, _, _ = saved

    def fail(file, digest):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(OSError, match="Input/output error"):
        ij.load_checkpoint(path)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    path = tmp_path_factory.mktemp("described") / "checkpoint"
    plan = ij.Plan((("conv2", ij.Tucker2(1, 2)),))
    model = ij.create_model("lenet", width=0.1, num_classes=3, plan=plan)
    metadata = Metadata(PREPROCESSING, ("a", "b", "c"), {"step": 7})
    ij.save_checkpoint(path, model, {"params": {"x": np.ones(3)}}, metadata=metadata)
    return path / "metadata.json"


@pytest.mark.parametrize("text", ["[]", "{}", "", '{"format": 1, "info": {}}'])
def test_a_broken_description_is_said_so(described, tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match="metadata.json|format None"):
        load_metadata(tmp_path)


DEEP = json.loads("[" * 600 + "]" * 600)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model",), [1]),
        (("model",), None),
        (("model", "name"), []),
        (("model", "name"), "lenet6"),
        (("model", "num_classes"), "3"),
        (("model", "num_classes"), 4),  # there are three names
        (("model", "width"), 10**400),
        (("model", "width"), [1]),
        (("model", "more"), 1),
        (("plan",), 3),
        (("plan",), DEEP),
        (("plan", 0), []),
        (("plan", 0, 0), 3),
        (("plan", 0, 1), {"kind": []}),
        (("plan", 0, 1, "rank_in"), "x"),
        (("preprocessing",), 5),
        (("preprocessing", "image_shape"), [32, 32]),
        (("preprocessing", "image_shape"), [32, 32.5, 3]),
        (("preprocessing", "image_shape"), {"a": 1}),
        (("preprocessing", "mean"), "abc"),
        (("preprocessing", "mean", 0), None),
        (("preprocessing", "std", 0), 10**400),
        (("preprocessing", "std", 0), 0),
        (("preprocessing", "resize"), DEEP),
        (("class_names",), 5),
        (("class_names",), [1, 2, 3]),
        (("class_names",), ["a"]),
        (("info",), 5),
    ],
)
def test_a_description_of_another_form_is_one_error(described, tmp_path, place, value):
    whole = json.loads(described.read_text())
    at = whole
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (tmp_path / "metadata.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"broken metadata\.json: \S") as caught:
        load_description(tmp_path)
    assert len(str(caught.value)) < 1000


def test_names_of_other_classes_are_not_saved(tmp_path):
    model = ij.create_model("lenet", num_classes=3)
    with pytest.raises(ValueError, match="2 `class_names` must be 3, or none"):
        ij.save_checkpoint(
            tmp_path / "c", model, {}, metadata=Metadata(None, ("a", "b"))
        )
    assert not list(tmp_path.iterdir())


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ij.load_checkpoint(tmp_path / "none")


def test_errors_name_the_start_of_what_a_file_holds(described, tmp_path):
    long, description = "x" * 10_000, json.loads(described.read_text())
    (tmp_path / "metadata.json").write_text(json.dumps(description | {"format": long}))
    with pytest.raises(ValueError, match="format 'xxx") as unknown:
        load_metadata(tmp_path)
    (tmp_path / "arrays").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({long: ""}))
    with pytest.raises(ij.CheckpointDamagedError, match="is damaged") as damaged:
        verify_checkpoint(tmp_path)
    assert max(len(str(error.value)) for error in (unknown, damaged)) < 800


def test_a_later_format_is_refused(saved):
    path, _, _ = saved
    file = path / "metadata.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_metadata(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((32, 32, 3), (0.5,), (0.2,) * 3), "`mean`.*3 entries"),
        (((32, 32, 1), (0.5,), (0.2,) * 3), "`std`.*1 entries"),
        (((32, 32, 1), (0.5,), (0.0,)), "`std`.*> 0"),
        (((32, 32, 1), (float("nan"),), (0.2,)), "`mean`.*finite"),
        (((32, 0, 1), (0.5,), (0.2,)), "`image_shape`.*>= 1"),
        (((32, 32, 1), (0.5,), (0.2,), 31), "`resize` .=31. must be at least .* 32"),
        (((32, 32, 1), (0.5,), (0.2,), 0), "`resize` .=0. must be at least .* 32"),
        (((24, 48, 1), (0.5,), (0.2,), 32), "`resize` .=32. must .* 24 x 48 pixels"),
        (((24, 48, 1), (0.5,), (0.2,), (23, 99)), "at least .* 24 x 48 pixels"),
    ],
)
def test_bad_preprocessing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(*arguments)


@pytest.mark.parametrize(
    ("resize", "kept", "sides"),
    [
        (None, None, (24, 48)),
        (48, 48, (48, 48)),
        ((48, 48), 48, (48, 48)),
        ((30, 60), (30, 60), (30, 60)),
    ],
)
def test_images_are_resized_to_one_side_or_to_two(resize, kept, sides, tmp_path):
    made = Preprocessing((24, 48, 1), (0.5,), (0.2,), resize)
    assert (made.resize, made.resized_sides) == (kept, sides)
    model = ij.create_model("lenet", width=0.1)
    variables = {"params": {"conv1": {"kernel": np.zeros(3)}}}
    path = tmp_path / "checkpoint"
    ij.save_checkpoint(path, model, variables, metadata=Metadata(made))
    assert load_metadata(path).preprocessing == made
    # A number stays a number, as earlier versions wrote it and read it.
    written = json.loads((path / "metadata.json").read_text())
    expected = list(kept) if isinstance(kept, tuple) else kept
    assert written["preprocessing"]["resize"] == expected


@pytest.mark.usefixtures("no_shape_checks")
def test_sides_are_one_number_or_two():
    assert both_sides(5) == both_sides([5, 5]) == (5, 5)
    with pytest.raises(ValueError, match="must be one number, or two"):
        both_sides((24, 48, 3))
    assert both_sides(np.int64(5)) == (5, 5)
    for sides in (32.0, "32", (24, 48.0), (24, "48"), None):
        with pytest.raises(ValueError, match=r"`sides` \(=.*\) must be integers"):
            both_sides(sides)
    with pytest.raises(ValueError, match="must be integers"):
        Preprocessing((24, 48, 1), (0.5,), (0.2,), 256.0)
    with pytest.raises(UsageError, match=r"`sides` \(=32.0\) must be integers"):
        Data(image_size=32.0)


def test_arrays_are_numbers_in_what_a_checkpoint_says(tmp_path, no_shape_checks):
    model = ij.create_model("lenet", width=0.0625)
    variables = ij.init_variables(model, jax.random.key(0))
    given = ij.Preprocessing((28, 28, 1), mean=np.array([0.5]), std=jax.numpy.ones(1))
    info = {"top1": jax.numpy.float32(0.5), "curve": np.arange(2.0)}
    info["key"] = jax.random.key(0)
    ij.save_checkpoint(
        tmp_path / "a", model, variables, metadata=ij.Metadata(given, info=info)
    )
    found = ij.load_metadata(tmp_path / "a")
    assert isinstance(found.info.pop("key"), str)
    assert found.info == {"top1": 0.5, "curve": [0.0, 1.0]}
    assert found.preprocessing == given == ij.Preprocessing((28, 28, 1), (0.5,), (1.0,))


@pytest.mark.parametrize("name", ["image_shape", "mean", "std"])
def test_what_is_no_list_of_numbers_is_named(name, no_shape_checks):
    fields = {"image_shape": (8, 8, 1), "mean": (0.5,), "std": (0.5,)}
    array = {**fields, name: np.array(fields[name])}
    assert ij.Preprocessing(**array) == ij.Preprocessing(**fields)
    with pytest.raises(ValueError, match=f"`{name}` .=0.5. must be numbers"):
        ij.Preprocessing(**{**fields, name: 0.5})


def test_names_that_no_reader_takes_are_not_written(tmp_path, no_shape_checks):
    model = ij.create_model("lenet", width=0.0625)
    variables = ij.init_variables(model, jax.random.key(0))
    about = ij.Metadata(class_names=tuple(range(10)))
    with pytest.raises(ValueError, match="`class_names` has 0; each must be a str"):
        ij.save_checkpoint(tmp_path / "a", model, variables, metadata=about)
    assert not (tmp_path / "a").exists()


def test_the_first_line_of_an_unknown_reason_is_said(tmp_path):
    error = _write_error(tmp_path / "a", ValueError("too long\nby a page"))
    assert str(error) == f"could not write {tmp_path / 'a'}: too long"
    assert error.errno is None
