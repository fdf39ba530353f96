"""Runs that start from a checkpoint: what is refused, a new head, warnings, names."""

import dataclasses
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT
from helpers import flat, save_bright_digits

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.config import Config, Data, Optimizer
from train.config_file import config_to_json
from train.data.sets import ImageSet, Split
from train.data.statistics import pixel_statistics, warn_of_normalisation
from train.errors import UsageError
from train.fit.checks import warn_of_learning_rate, warn_of_unreached
from train.fit.initial import check_initial, head_paths, read_initial, verify_initial
from train.fit.loop import _check_same_sources, _with_classes_of_run
from train.machine.processes import warn
from train.networks import model_config
from train.options.fit import parse
from train.run.directory import RunDirectory
from train.step.optimizer import make_schedule
from train.verbs.finetune import _checkpoint_name

pytestmark = pytest.mark.usefixtures("one_device")
SHAPE = (8, 8, 1)
NAMES = tuple("abcdefghij")


def check_resumed(there, here):
    """Checks a checkpoint with a JSON config in a run with another configuration."""
    data = SimpleNamespace(describe=lambda: {"name": "digits"})
    trainer = SimpleNamespace(config=here, data=data, teacher_sha256=None)
    info = {"config": there, "data": data.describe()}
    _check_same_sources("step_1", info, trainer)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (Config(seed=2), Config(seed=1), "seed: 2 there, 1 here"),
        (Config(), Config(batch_size=64), "batch_size: 128 there, 64 here"),
        (
            Config(data=Data(source="npz:/one/set.npz")),
            Config(data=Data(source="npz:/one/other.npz")),
            "data.source: 'set.npz' there, 'other.npz' here",
        ),
        (
            {**config_to_json(Config()), "data": []},
            Config(),
            r"data: \[\] there",
        ),
        (
            {**config_to_json(Config()), "data": {"source": None}},
            Config(),
            "data.source: None there",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_not_gone_on_with(
    there, here, message, no_shape_checks
):
    config = config_to_json(there) if isinstance(there, Config) else there
    with pytest.raises(UsageError, match=rf"another config(?s:.*){message}") as found:
        check_resumed(config, here)
    assert "Move it elsewhere, or undo" in str(found.value)
    assert "Remove" not in str(found.value)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"cache_dir": "old"}, {"cache_dir": "new"}),
        ({"source": "npz:/old/set.npz"}, {"source": "npz:/new/set.npz"}),
        ({"source": "npz:set.npz"}, {"source": "npz:/new/set.npz"}),
        ({"source": "imagefolder:old/set"}, {"source": "imagefolder:set"}),
        ({"memory_share": 0.25}, {"memory_share": 0.5}),
    ],
)
def test_a_checkpoint_is_gone_on_with_where_data_moved(there, here, no_shape_checks):
    before = config_to_json(Config(data=Data(**there)))
    check_resumed(before, Config(data=Data(**here)))


def test_a_checkpoint_is_gone_on_with_in_another_manner(no_shape_checks):
    before = config_to_json(Config(init="/old/network", checkpoint_steps=3))
    now = Config(
        name="renamed",
        epochs=300,
        init="/new/network",
        eval_batch_size=100,
        checkpoint_minutes=1.0,
        log_steps=5,
        steps_per_call=2,
    )
    check_resumed(before, now)
    del before["name"]  # an older version had fewer fields
    check_resumed(before, now)


def test_data_lie_elsewhere_on_each_machine(no_shape_checks, monkeypatch, tmp_path):
    there = Config(data=Data(source="npz:/first/a.npz", cache_dir="first"))
    here = Config(data=Data(source="npz:/second/b.npz", cache_dir="second"))
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "step_00000001").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config_to_json(there)))
    monkeypatch.setattr("jax.process_index", lambda: 1)
    check_resumed(config_to_json(there), here)
    RunDirectory(workdir, here, resume=True)
    with pytest.raises(UsageError, match="seed: 1 there, 2 here"):
        RunDirectory(workdir, dataclasses.replace(here, seed=2), resume=True)
    monkeypatch.setattr("jax.process_index", lambda: 0)
    with pytest.raises(UsageError, match="data.source: 'a.npz' there"):
        check_resumed(config_to_json(there), here)
    with pytest.raises(UsageError, match="data.source: 'npz:/first/a.npz' there"):
        RunDirectory(workdir, here, resume=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Ten named classes; nothing was trained."""
    path = tmp_path_factory.mktemp("saved") / "network"
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)
    metadata = Metadata(Preprocessing(SHAPE, (0.43,), (0.25,)), NAMES)
    ij.save_checkpoint(path, model, variables, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Images of ten classes, and images of three of them."""
    folder = tmp_path_factory.mktemp("data")
    ten = save_bright_digits(folder / "ten.npz", 64, 20, 8)
    arrays = dict(np.load(folder / "ten.npz"))
    for split in ("train", "test"):
        arrays[f"y_{split}"] %= 3
    np.savez(folder / "three.npz", **arrays, label_names=["x", "y", "z"])
    return {10: ten, 3: f"npz:{folder / 'three.npz'}"}


def finetune(checkpoint, source, workdir, *options):
    arguments = ["finetune", str(checkpoint), "--data", source, "--epochs", "1"]
    arguments += ["--batch-size", "8", "--workdir", str(workdir), *options]
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 10])
def test_a_new_head_is_drawn_and_everything_else_kept(
    classes, checkpoint, sources, tmp_path, capsys
):
    options = ["--new-head", "--train-only", "fc2", "--optimizer.weight-decay", "0"]
    options += ["--optimizer.learning-rate", "1e-6"]
    found = []
    for seed in ("1", "2"):
        workdir = tmp_path / f"run{seed}"
        command = [*options, "--seed", seed]
        assert finetune(checkpoint, sources[classes], workdir, *command) == 0
        found.append(ij.load_checkpoint(workdir))
    assert "is 'x' in" not in capsys.readouterr().err  # other names are meant
    (model, variables), (_, other) = found
    before, after, drawn = map(
        flat, (ij.load_checkpoint(checkpoint)[1], variables, other)
    )
    assert model.num_classes == classes
    for path in before:
        if path.startswith("params/fc2/"):
            assert after[path].shape[-1] == classes
            if classes == 10:
                assert np.all(after[path] != before[path])
            assert np.all(after[path] != drawn[path])  # by the seed
        else:
            np.testing.assert_array_equal(after[path], before[path])
    metadata = ij.load_metadata(tmp_path / "run1")
    assert len(metadata.class_names) == classes
    # The run goes on with the head that it has.
    command = ["--seed", "1", "--resume"]
    workdir = tmp_path / "run1"
    assert finetune(checkpoint, sources[classes], workdir, *options, *command) == 0
    assert main(["evaluate", str(workdir)]) == 0


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "vgg16", "simpledla"])
def test_the_head_is_what_has_a_row_a_class(name):
    model = ij.create_model(name, width=0.1, num_classes=7)
    linear = "classifier" if name == "vgg16" else "linear"
    paths = head_paths(model, (32, 32, 3))
    assert paths == {f"params/{linear}/kernel", f"params/{linear}/bias"}


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Whatever would draw a network's variables."""

    def fail(*args, **kwargs):
        raise AssertionError("variables were drawn")

    monkeypatch.setattr("train.fit.trainer.drawn_variables", fail)


@pytest.mark.usefixtures("nothing_compiled")
def test_other_classes_are_refused_before_anything_is_compiled(
    checkpoint, sources, tmp_path, capsys
):
    workdir = tmp_path / "run"
    assert finetune(checkpoint, sources[3], workdir) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.endswith(
        "/network) has 10 classes, three has 3; --new-head draws a last layer for them."
    )
    assert len(line) < 200 + len(str(checkpoint))
    assert not workdir.exists()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.width", "0.2"], r"another network than `model`: width: 0.1 there"),
        (["--model.name", "resnet20"], "another network .* name: 'lenet' there"),
        (["--model.dtype", "bfloat16"], "another network .* dtype: 'float32' there"),
        (
            ["--model.plan", ij.Plan((("conv2", ij.Inertial(1, 3)),)).to_json()],
            "another network than `model`: plan\\.$",
        ),
        (["--data.image-size", "12"], "takes images of .*8.* the run has .*12"),
        (["--data.mean", "0.4"], r"was trained with `mean` \(0.43,\)"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_a_line(
    options, message, checkpoint, sources, tmp_path, capsys
):
    arguments = ["fit", "--data", sources[10], "--init", str(checkpoint)]
    arguments += ["--model.name", "lenet", "--model.width", "0.1", "--batch-size", "8"]
    arguments += ["--data.mean", "0.43", "--data.std", "0.25", *options]
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"sown": {"x": np.ones(2)}}, r"sown/x: \(2,\)"),
        (lambda v: {"params": {**v["params"], "fc1": {}}}, "params/fc1/bias: None"),
        (
            lambda v: jax.tree.map(lambda leaf: leaf[:3], v),
            r"params/conv2/bias: \(3,\) there, \(6,\) here",
        ),
    ],
)
def test_variables_of_another_network_are_refused(
    change, message, checkpoint, sources, tmp_path, capsys
):
    model, variables = ij.load_checkpoint(checkpoint)
    metadata = ij.load_metadata(checkpoint)
    path = tmp_path / "foreign"
    ij.save_checkpoint(path, model, change(variables), metadata=metadata)
    assert finetune(path, sources[10], tmp_path / "run") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert re.search(f"has not the variables of its network: .*{message}", line)


def test_a_new_head_needs_a_checkpoint(sources, tmp_path, capsys):
    arguments = ["fit", "--data", sources[10], "--new-head"]
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    assert "`new_head` (=True) does nothing with `init`" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_before_data_are_read(
    checkpoint, tmp_path, capsys
):
    model, variables = ij.load_checkpoint(checkpoint)
    damaged = tmp_path / "damaged"
    metadata = ij.load_metadata(checkpoint)
    ij.save_checkpoint(damaged, model, variables, metadata=metadata)
    files = [file for file in (damaged / "arrays").rglob("*") if file.is_file()]
    file = max(files, key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    assert finetune(damaged, "npz:nowhere.npz", tmp_path / "run") == 2
    assert "damaged is damaged: arrays/" in capsys.readouterr().err


def test_the_checkpoint_of_a_run_is_hashed_once(checkpoint, monkeypatch):
    model, variables = ij.load_checkpoint(checkpoint)
    test = Split(np.zeros((1, *SHAPE), np.uint8), np.zeros(1, np.int32))
    data = ImageSet("set", None, test, NAMES)
    config = Config(
        init=str(checkpoint),
        data=Data(mean=(0.43,), std=(0.25,)),
        model=model_config(model),
    )
    hashed = []
    monkeypatch.setattr("train.fit.initial.verify_checkpoint", hashed.append)
    verify_initial(config)
    check_initial(config, data)
    found = read_initial(config, data, model, jax.random.key(0), expected=variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert hashed == [checkpoint]


def test_classes_in_another_order_are_those_of_the_checkpoint_by_name(
    checkpoint, tmp_path, capsys
):
    split = Split(np.zeros((3, *SHAPE), np.uint8), np.array([0, 1, 9], np.int32))
    data = ImageSet("set", split, split, NAMES[::-1])
    config = Config(
        init=str(checkpoint),
        data=Data(mean=(0.43,), std=(0.25,)),
        model=model_config(ij.load_checkpoint(checkpoint)[0]),
    )
    found = check_initial(config, data)
    assert found.class_names == NAMES
    assert found.train.labels.tolist() == found.test.labels.tolist() == [9, 8, 0]
    assert "classes of set are those of" in capsys.readouterr().err
    # With a new head, they are the data's own.
    assert check_initial(dataclasses.replace(config, new_head=True), data) is data
    # A resumed run has the classes that it began with, as its checkpoints say.
    shutil.copytree(checkpoint, tmp_path / "step_00000001")
    (tmp_path / "step_00000002").mkdir()
    assert _with_classes_of_run(data, tmp_path).class_names == NAMES


def test_statistics_are_numpys():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(100, 5, 7, 3), dtype=np.uint8)
    images[..., 1] //= 3
    mean, std = pixel_statistics(Split(images, np.zeros(100, np.int32)))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)
    # Of many images some are measured, from every part of a sorted set.
    many = np.repeat(np.arange(10, dtype=np.uint8) * 20, 400)[:, None, None, None]
    mean, std = pixel_statistics(Split(many, np.zeros(4000, np.int32)))
    np.testing.assert_allclose(mean, (many / 255).mean(), rtol=0.02)
    np.testing.assert_allclose(std, (many / 255).std(), rtol=0.02)


@pytest.mark.slow
def test_other_statistics_than_the_checkpoints_are_said(
    checkpoint, sources, tmp_path, capsys
):
    assert finetune(checkpoint, sources[10], tmp_path / "like") == 0
    assert "warning" not in capsys.readouterr().err
    arrays = dict(np.load(sources[10].removeprefix("npz:")))
    for split in ("train", "test"):
        arrays[f"x_{split}"] //= 3
    np.savez(tmp_path / "dark.npz", **arrays)
    source = f"npz:{tmp_path / 'dark.npz'}"
    assert finetune(checkpoint, source, tmp_path / "unlike") == 0
    mean, std = arrays["x_train"].mean() / 255, arrays["x_train"].std() / 255
    said = re.search(
        r"warning: the training images of dark have mean \((.*),\) and deviation "
        r"\((.*),\), of pixels in \[0, 1\]; the checkpoint has \(0.43,\) and "
        r"\(0.25,\)\.\n",
        capsys.readouterr().err,
    )
    assert said is not None
    np.testing.assert_allclose([float(x) for x in said.groups()], [mean, std], 1e-2)


@pytest.mark.parametrize(
    ("epochs", "optimizer", "message"),
    [
        (12, {}, "does not fall after epoch 150, 225 (`optimizer.milestones`)"),
        (200, {}, "does not fall after epoch 225 (`optimizer.milestones`)"),
        (12, {"milestones": (12,)}, "after epoch 12"),  # the end itself
        (12, {"milestones": (6, 11)}, None),
        (12, {"schedule": "cosine"}, None),
        (
            3,
            {"schedule": "exponential", "decay_epochs": 3},
            "after epoch 3 (`optimizer.decay_epochs`): the run ends after epoch 3.",
        ),
        (3, {"schedule": "exponential", "decay_epochs": 2}, None),
    ],
)
def test_a_fall_that_never_comes_is_said_once(epochs, optimizer, message, capsys):
    warn.cache_clear()
    for _ in range(2):
        warn_of_unreached(Config(epochs=epochs, optimizer=Optimizer(**optimizer)))
    said = capsys.readouterr().err
    assert message in said if message else not said
    assert said.count("\n") == (message is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 16}, None),
        (
            {"batch_size": 8},
            "0.1 is far .* sgd at a batch of 8, 0.00062 to 0.012 .Goyal",
        ),
        ({"batch_size": 512, "learning_rate": 3.0}, None),
        ({"batch_size": 16, "learning_rate": 0.3, "momentum": 0.5}, None),
        ({"learning_rate": 1e-5}, "1e-05 is far .* hardly learn"),
        ({"learning_rate": 1e-5, "init": "runs/dense"}, None),
        (
            {"learning_rate": 1e-3, "base_batch_size": 8, "batch_size": 8192},
            None,
        ),
        ({"name": "adamw"}, "0.1 is far .* of adamw .* 0.0001 to 0.002 .Losh"),
        ({"name": "adamw", "learning_rate": 1e-3}, None),
        ({"name": "lion", "learning_rate": 1e-2}, "of lion .*Chen et al., 2023"),
        ({"name": "muon", "learning_rate": 1e-2}, None),
        ({"name": "muon"}, "of muon .*Liu et al., 2025"),
        ({"name": "adadelta", "learning_rate": 1.0}, None),
    ],
)
def test_an_unusual_learning_rate_is_said_with_the_usual_one(options, message, capsys):
    warn.cache_clear()
    of_run = {key: options[key] for key in ("batch_size", "init") if key in options}
    of_step = {key: value for key, value in options.items() if key not in of_run}
    warn_of_learning_rate(Config(**of_run, optimizer=Optimizer(**of_step)))
    said = capsys.readouterr().err
    assert said.count("\n") == (message is not None)
    if message is not None:
        assert re.search(message, said), said


def test_other_statistics_are_said_once(capsys):
    warn.cache_clear()
    dark = Split(np.zeros((4, *SHAPE), np.uint8), np.zeros(4, np.int32))
    for _ in range(2):
        data = ImageSet("dark", dark, dark, NAMES)
        warn_of_normalisation(data, (0.5,), (0.25,), whose="the configuration")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("warning: the training images of dark have mean (0.0,)")


def test_the_documented_commands_do_not_collide_and_reach_their_falls(capsys):
    text = (ROOT / "docs" / "training.md").read_text().replace("\\\n", "")
    found = re.findall(r"^    python -m train fit (.*)$", text, re.MULTILINE)
    whole, narrow = (parse(shlex.split(command)).run for command in found[:2])
    assert whole.name != narrow.name and narrow.model.width == 0.25
    warn_of_unreached(narrow)
    assert not capsys.readouterr().err
    schedule = make_schedule(narrow.optimizer, steps_per_epoch=1, epochs=narrow.epochs)
    np.testing.assert_allclose(schedule(narrow.epochs - 1), 0.01)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("checkpoints/half", "half"),
        ("checkpoints/half/", "half"),
        ("runs/dense", "dense"),
        ("runs/dense/checkpoints", "dense"),
        ("runs/dense/checkpoints/step_00000030", "dense_step_00000030"),
        ("runs/other/../dense", "dense"),
    ],
)
def test_a_fine_tuning_is_named_after_its_checkpoint(given, name):
    assert _checkpoint_name(given) == name


@pytest.mark.slow
def test_two_checkpoints_are_fine_tuned_one_after_the_other(
    checkpoint, sources, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, variables = ij.load_checkpoint(checkpoint)
    metadata = ij.load_metadata(checkpoint)
    for name in ("one", "two"):
        ij.save_checkpoint(tmp_path / name, model, variables, metadata=metadata)
        arguments = ["finetune", name, "--data.source", sources[10], "--epochs", "1"]
        assert main([*arguments, "--batch-size", "8"]) == 0
        config = json.loads(
            (tmp_path / f"runs/finetune_{name}/config.json").read_text()
        )
        assert config["name"] == f"finetune_{name}"
