"""Opening checkpoints: what they say of themselves, and how often they are read."""

import collections
import dataclasses
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.config import Config, Data, Model
from train.config_file import config_to_json
from train.errors import UsageError
from train.networks import from_checkpoint, read_description, read_network

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
        # For the defaults, then twice with the variables that training starts from.
        ("finetune", "--epochs 1 --batch-size 8 --workdir tuned", 3),
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


@pytest.mark.parametrize("read", [read_description, read_network])
def test_a_checkpoint_without_preprocessing_is_refused(read, tmp_path):
    save(tmp_path / "plain", preprocessing=None)
    with pytest.raises(UsageError, match="plain has no preprocessing"):
        read(tmp_path / "plain")


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
