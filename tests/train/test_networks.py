"""Opening checkpoints: what they say of themselves, and how often they are read."""

import collections
import dataclasses
import hashlib
import importlib
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tyro
from PIL import Image

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.compress.options import Compress
from train.config import Config, Data, Model
from train.config_file import config_to_json, differing_fields
from train.errors import UsageError
from train.networks import from_checkpoint, read_description, read_network
from train.options.evaluate import Evaluate
from train.options.fit import parse
from train.options.sweep import SweepArguments
from train.run.checkpoints import find_checkpoint
from train.verbs.finetune import run as run_finetune

pytestmark = pytest.mark.usefixtures("one_device")
SHAPE = (8, 8, 1)
SEEN = Preprocessing(SHAPE, (0.5,), (0.25,))
DATA = Data(mean=(0.5,), std=(0.25,), crop_padding=1, crop_mode="reflect")
NAMES = tuple(map(str, range(10)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "set.npz"
    images, labels = {}, {}
    for split in ("train", "test"):
        images[f"x_{split}"] = rng.integers(256, size=(40, *SHAPE), dtype=np.uint8)
        labels[f"y_{split}"] = rng.integers(10, size=40)
    np.savez(path, **images, **labels)
    return f"npz:{path}"


def save(path, *, plan=None, preprocessing=SEEN, data=None):
    model = ij.create_model("lenet", width=0.2, plan=plan or ij.Plan())
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)
    config = config_to_json(Config(data=data)) if data else None
    info = {"config": config} if config else {}
    metadata = Metadata(preprocessing, NAMES, info)
    ij.save_checkpoint(path, model, variables, metadata=metadata)
    return model, variables


@pytest.fixture
def openings(monkeypatch):
    """Counts, by checkpoint, of metadata read and of arrays restored."""
    reads, restores = collections.Counter(), collections.Counter()
    read_bytes, restore = pathlib.Path.read_bytes, ocp.Checkpointer.restore

    def count_read(self):
        if self.name == "metadata.json":
            reads[self.parent] += 1
        return read_bytes(self)

    def count_restore(self, directory, *args, **options):
        restores[pathlib.Path(directory).parent] += 1
        return restore(self, directory, *args, **options)

    monkeypatch.setattr(pathlib.Path, "read_bytes", count_read)
    monkeypatch.setattr(ocp.Checkpointer, "restore", count_restore)
    return reads, restores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "options", "reads"),
    [
        ("evaluate", "", 1),
        ("export", "--out exported --batch-size 8", 1),
        ("compress", "--ranks ratio:0.5 --out small --calibration-images 8", 1),
        # For the defaults, then by the run that starts from it.
        ("finetune", "--epochs 1 --batch-size 8 --workdir tuned", 2),
    ],
)
def test_a_checkpoint_is_opened_once(
    verb, options, reads, source, openings, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint"
    # Gates: their cost at the measured rates is counted, too.
    plan = ij.Plan((("conv2", ij.Inertial(1, 3)),))
    save(path, plan=plan, data=dataclasses.replace(DATA, source=source))
    assert main([verb, str(path), *options.split()]) == 0
    assert [counter[path] for counter in openings] == [reads, 1]


def test_a_network_is_what_was_saved(tmp_path, openings):
    path = tmp_path / "checkpoint"
    data = dataclasses.replace(DATA, source="digits", image_size=8)
    model, variables = save(path, data=data)
    network = read_network(path)
    assert network.model == model and network.metadata.preprocessing == SEEN
    assert network.trained_on == data and network.source == "digits"
    assert network.class_names == NAMES
    jax.tree.map(np.testing.assert_array_equal, network.variables, variables)
    assert network.cost() == ij.count_cost(model, SHAPE)
    description = read_description(path)
    assert description.model == model and description.info == network.info
    assert sum(openings[1].values()) == 1


def test_what_is_not_recorded_is_none(tmp_path):
    save(tmp_path / "imported")
    network = read_description(tmp_path / "imported")
    assert network.trained_on is None and network.source is None


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint"
    save(path)
    file = path / "metadata.json"
    file.write_text(file.read_text().replace("0.25", "0.26"))
    with pytest.raises(UsageError, match="is damaged: metadata.json"):
        read_network(path)
    with pytest.raises(UsageError, match="there is no checkpoint"):
        read_description(tmp_path / "none")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("width", 0.4, r"params/conv1/kernel is \(3, 3, 1, 6\), must be"),
        ("name", "resnet20", "params/.* is missing, must be"),
    ],
)
def test_a_network_that_has_other_arrays_is_refused(field, value, said, tmp_path):
    save(tmp_path / "c")
    file = tmp_path / "c/metadata.json"
    told = json.loads(file.read_text())
    told["model"][field] = value
    file.write_text(json.dumps(told))
    manifest = tmp_path / "c/manifest.json"
    hashes = json.loads(manifest.read_text())
    hashes["metadata.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(hashes))
    with pytest.raises(
        UsageError, match=f"is not of the network that it names: .*{said}"
    ):
        read_network(tmp_path / "c")


@pytest.mark.parametrize("read", [read_description, read_network])
def test_a_checkpoint_without_preprocessing_is_refused(read, tmp_path):
    save(tmp_path / "plain", preprocessing=None)
    with pytest.raises(UsageError, match="plain has no preprocessing"):
        read(tmp_path / "plain")


def test_what_compress_was_told_of_the_data_is_remembered(tmp_path):
    info = {"compressed": {"data": "npz:there", "crop_padding": 3, "cache_dir": "c"}}
    model, variables = save(tmp_path / "imported")
    ij.save_checkpoint(
        tmp_path / "small", model, variables, metadata=Metadata(SEEN, NAMES, info)
    )
    network = read_description(tmp_path / "small")
    assert network.source == "npz:there"
    told = Data("npz:there", "c", mean=(0.5,), std=(0.25,), crop_padding=3, flip=False)
    assert network.trained_on == told
    config = from_checkpoint(Config(), network, keep_data=False)
    # The size is the network's, and what was not told is as in any training, as it is
    # for an imported one.
    assert config.data == dataclasses.replace(told, image_size=8, flip=True)
    # Of what was recorded in training, the rest stays.
    info["config"] = config_to_json(Config(data=dataclasses.replace(DATA, flip=True)))
    ij.save_checkpoint(
        tmp_path / "both", model, variables, metadata=Metadata(SEEN, NAMES, info)
    )
    both = read_description(tmp_path / "both").trained_on
    new = {"source": "npz:there", "cache_dir": "c", "crop_padding": 3, "flip": True}
    assert both == dataclasses.replace(DATA, **new)
    info["compressed"]["data"] = None  # compressed without data
    ij.save_checkpoint(
        tmp_path / "blind", model, variables, metadata=Metadata(SEEN, NAMES, info)
    )
    blind = read_description(tmp_path / "blind").trained_on
    assert blind == dataclasses.replace(DATA, flip=True)


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"config": None},
        {"config": "resnet"},
        {"config": {"data": None}},
        {"config": {"data": "cifar10"}},
        {"config": {"data": {"folder": "x"}}},
        {"compressed": True},
    ],
)
def test_what_others_record_is_no_data(info, tmp_path):
    model, variables = save(tmp_path / "plain")
    metadata = Metadata(SEEN, NAMES, info)
    ij.save_checkpoint(tmp_path / "foreign", model, variables, metadata=metadata)
    network = read_description(tmp_path / "foreign")
    assert network.trained_on is None and network.source is None
    config = from_checkpoint(Config(), network, keep_data=False)
    assert (config.data.source, config.data.image_size) == ("", 8)


def test_what_is_half_recorded_is_not_guessed(tmp_path):
    model, variables = save(tmp_path / "plain")
    for name, data in (("half", {"source": "here"}), ("bad", {"crop_padding": "4"})):
        metadata = Metadata(SEEN, NAMES, {"config": {"data": data}})
        ij.save_checkpoint(tmp_path / name, model, variables, metadata=metadata)
    network = read_description(tmp_path / "half")
    own = Data("here", mean=(0.5,), std=(0.25,), crop_padding=0, flip=False)
    assert network.trained_on == own
    config = from_checkpoint(Config(), network, keep_data=False)
    augmented = {"crop_padding": 4, "flip": True}
    assert config.data == dataclasses.replace(own, image_size=8, **augmented)
    with pytest.raises(UsageError, match="bad does not say in a known form"):
        _ = read_description(tmp_path / "bad").trained_on


@pytest.mark.parametrize("recorded", [{}, {"flip": False}])
def test_augmentation_that_nobody_recorded_is_said(
    recorded, tmp_path, capsys, monkeypatch
):
    model, variables = save(tmp_path / "imported")
    told = {"compressed": {"data": "npz:there", **recorded}}
    metadata = Metadata(SEEN, NAMES, told)
    ij.save_checkpoint(tmp_path / "small", model, variables, metadata=metadata)
    seen = []

    def train(run):
        seen.append(run.run.data)
        return 0

    monkeypatch.setattr("train.verbs.finetune.train", train)
    assert not run_finetune([str(tmp_path / "small"), "--data.crop-padding", "3"])
    (data,) = seen
    said = "`data.crop_padding` (=3)" + ("" if recorded else " and `data.flip` (=True)")
    assert f"how its images were augmented; this run has {said}\n" in (
        capsys.readouterr().err
    )
    assert (data.crop_padding, data.flip) == (3, not recorded)
    save(tmp_path / "trained", data=dataclasses.replace(DATA, source="npz:there"))
    run_finetune([str(tmp_path / "trained")])
    assert "augmented" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["finetune", "evaluate"])
def test_a_compressed_import_needs_its_data_said_once(verb, source, tmp_path, capsys):
    save(tmp_path / "imported")
    out = tmp_path / "small"
    sizes = ["--calibration-images", "8", "--recalibration-images", "8"]
    arguments = ["compress", str(tmp_path / "imported"), "--ranks", "ratio:0.5", *sizes]
    # The spelling of `fit`.
    arguments += ["--out", str(out), "--data.source", source]
    assert main([*arguments, "--data.crop-padding", "1"]) == 0
    options = ["--epochs", "1", "--batch-size", "8", "--workdir", str(tmp_path / "run")]
    assert main([verb, str(out), *(options if verb == "finetune" else [])]) == 0
    if verb == "finetune":
        tuned = read_description(find_checkpoint(tmp_path / "run")).trained_on
        assert tuned is not None
        assert (tuned.source, tuned.crop_padding) == (source, 1)
        # Nobody said it: it is the default of a training, and printed.
        assert tuned.flip == Data.flip
        assert "`data.flip` (=True)" in capsys.readouterr().err


@pytest.mark.parametrize("equals", [True, False])
def test_what_is_the_same_has_the_same_names_everywhere(equals):
    values = {"--data": "npz:x", "--cache-dir": "c", "--crop-padding": "3"}

    def words(nested, count):
        named = {
            (f"--data.{name[2:]}" if nested else name): value
            for name, value in list(values.items())[:count]
        }
        if nested:
            named["--data.source"] = named.pop("--data.data")
        pairs = [(name, value) for name, value in named.items()]
        return [f"{n}={v}" for n, v in pairs] if equals else [*sum(pairs, ())]

    for nested in (True, False):
        fit = parse(words(nested, 3)).run.data
        assert (fit.source, fit.cache_dir, fit.crop_padding) == ("npz:x", "c", 3)
        small = tyro.cli(
            Compress, args=["a", "--out", "b", "--ranks", "evbmf", *words(nested, 3)]
        )
        assert (small.data, small.cache_dir, small.crop_padding) == ("npz:x", "c", 3)
        found = tyro.cli(Evaluate, args=["a", *words(nested, 2)])
        assert (found.data, found.settings.cache_dir) == ("npz:x", "c")
        sweep = ["a", "--out", "b", *words(nested, 1)]
        assert tyro.cli(SweepArguments, args=sweep).data == "npz:x"
        for module in ("loop", "sweep"):
            suite = importlib.import_module(f"train.benchmark.{module}").Suite
            assert tyro.cli(suite, args=words(nested, 1)).data == "npz:x"


@pytest.mark.parametrize("keep_data", [True, False])
def test_training_goes_on_from_a_checkpoint(keep_data, tmp_path):
    path = tmp_path / "checkpoint"
    plan = ij.Plan((("conv2", ij.Tucker2(2, 3)),))
    there = dataclasses.replace(DATA, source="there", image_size=8)
    save(path, plan=plan, data=there)
    own = Data(source="own", crop_padding=3, mean=(0.1,), eval_resize=9)
    config = Config(name="tune", epochs=7, data=own, model=Model("vgg16"))
    config = from_checkpoint(config, read_description(path), keep_data=keep_data)
    assert (config.name, config.epochs, config.init) == ("tune", 7, str(path))
    assert config.model == Model("lenet", width=0.2, plan=plan.to_json())
    # Images come as the network knows them, whatever augments them.
    form = {"image_size": 8, "mean": (0.5,), "std": (0.25,), "eval_resize": None}
    data = own if keep_data else there
    assert config.data == dataclasses.replace(data, **form)


LONG = ij.Plan(
    tuple((f"layer{i}/conv{j}", ij.Tucker2(i, j)) for i in range(1, 9) for j in (1, 2))
)


@pytest.mark.usefixtures("no_shape_checks")
def test_no_error_is_as_long_as_a_plan(tmp_path, capsys):
    rules = LONG.rules
    other = ij.Plan((*rules[:7], ("layer9/conv9", ij.Tucker2(9, 9)), *rules[8:]))
    texts = LONG.to_json(), other.to_json()
    assert min(map(len, texts)) > 1000
    # A run that is resumed: what differs is shown, and not the rest.
    (line,) = differing_fields(*({"model": {"plan": text}} for text in texts))
    assert line.startswith("model.plan: ...") and len(line) < 300
    assert "layer4/conv2" in line and "layer9/conv9" in line
    # Names of classes, of which one is missing.
    names = [f"class {index}" for index in range(1000)]
    (line,) = differing_fields({"class_names": names}, {"class_names": names[:-1]})
    assert len(line) < 300 and "'class 999'] there, " in line
    assert differing_fields({"a": 1}, {"a": None}) == ["a: 1 there, None here"]
    # A plan that is broken, or changed where it may not be.
    for broken in (texts[0][:-1], f'{{"plan": {texts[0]}}}', f"[{texts[0]}]"):
        with pytest.raises(ValueError, match="^a plan ") as error:
            ij.Plan.from_json(broken)
        assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="`plan`") as error:
        ij.create_model("lenet", plan=texts[0])
    assert len(str(error.value)) < 300
    path = tmp_path / "checkpoint"
    save(path, data=dataclasses.replace(DATA, source="digits"))
    assert main(["finetune", str(path), "--model.plan", texts[0]]) == 2
    said = capsys.readouterr().err
    assert "must be the checkpoint's" in said and len(said) < 700
    # Another network than that of the checkpoint that training starts from.
    options = ["--init", str(path), "--model.name", "lenet", "--model.width", "0.3"]
    options += ["--data.source", "digits", "--data.mean", "0.5", "--data.std", "0.25"]
    assert main(["fit", *options, "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "another network than `model`: width: 0.2 there, 0.3 here.\n" in said


@pytest.mark.slow
def test_images_of_several_sizes_are_resized_to_train_further(tmp_path, capsys):
    model = ij.create_model("lenet", width=0.1, num_classes=2)
    variables = ij.init_variables(model, jax.random.key(0), (8, 12, 3))
    seen = Preprocessing((8, 12, 3), (0.5,) * 3, (0.25,) * 3)
    data = Data(source="gone", mean=seen.mean, std=seen.std, crop_padding=0)
    info = {"config": config_to_json(Config(data=data))}
    path = tmp_path / "checkpoint"
    ij.save_checkpoint(path, model, variables, metadata=Metadata(seen, (), info))
    for split in ("train", "test"):
        for label, sides in enumerate([(8, 12), (16, 24)]):
            place = tmp_path / "images" / split / str(label)
            place.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", sides[::-1]).save(place / f"{index}.png")
    arguments = ["finetune", str(path), "--epochs", "1", "--batch-size", "2"]
    arguments += ["--data.source", f"imagefolder:{tmp_path / 'images'}"]
    arguments += ["--data.cache-dir", str(tmp_path), "--workdir", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "set `data.image_size` to have them resized" in capsys.readouterr().err
    assert main([*arguments, "--data.image-size", "8", "12"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    # What the checkpoint has itself stays.
    assert main([*arguments, "--data.mean", "0", "0", "0"]) == 2
