"""Images whose height is not their width, through every command that resizes."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import evaluate
from PIL import Image

import inertia_jax as ij
from inertia_jax.metadata import Preprocessing, load_metadata
from inertia_jax.models.create import abstract_variables
from train.__main__ import main
from train.compress.options import Compress
from train.compress.stages import load_training_images
from train.config import Config, Data
from train.config_file import config_to_json
from train.data.augment import Augmentation
from train.data.training_inputs import training_inputs
from train.errors import UsageError
from train.networks import NetworkDescription, from_checkpoint
from train.options.fit import parse

pytestmark = pytest.mark.usefixtures("one_device")

HEIGHT, WIDTH = 24, 48


def draw(label, height=HEIGHT, width=WIDTH):
    """An image whose class shows in the left and right quarter alone."""
    rng = np.random.default_rng(label)
    image = rng.integers(100, 130, size=(height, width, 3), dtype=np.uint8)
    quarter = width // 4
    image[:, :quarter] = image[:, -quarter:] = (0, 128, 255)[label % 3]
    return image


def save_folder(root, height=HEIGHT, width=WIDTH, *, train=20, test=8):
    for split, count in (("train", train), ("test", test)):
        for label in range(3):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(draw(label + 3 * index, height, width))
                image.save(place / f"{index}.png")
    return f"imagefolder:{root}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images of 24 x 48, the options of its data, and their source."""
    root = tmp_path_factory.mktemp("sides")
    source = save_folder(root / "images")
    arguments = ["--data.source", source, "--data.cache-dir", str(root / "cache")]
    arguments += ["--model.name", "resnet20", "--model.width", "0.25"]
    arguments += ["--batch-size", "20", "--epochs", "4", "--workdir", str(root / "run")]
    arguments += ["--data.crop-padding", "2", "--optimizer.learning-rate", "0.05"]
    assert main(["fit", *arguments]) == 0
    return root / "run", source, root / "cache"


def accuracy(checkpoint, tmp_path, *options):
    out = tmp_path / "found.json"
    assert main(["evaluate", str(checkpoint), *options, "--out", str(out)]) == 0
    return json.loads(out.read_text())["top1"]


@pytest.mark.slow
def test_every_command_keeps_the_shape_of_images(trained, tmp_path):
    run, source, cache = trained
    assert evaluate(run, tmp_path)["top1"] == 1
    own = ["--data", source, "--cache-dir", str(cache)]
    assert accuracy(run, tmp_path, *own, "--resize") == 1
    # Images twice as large, and images whose middle has the network's shape.
    for name, sides in (("double", (48, 96)), ("odd", (36, 72))):
        larger = save_folder(tmp_path / name, *sides, train=1)
        options = ["--data", larger, "--cache-dir", str(tmp_path), "--resize"]
        assert accuracy(run, tmp_path, *options) == 1
    small = tmp_path / "small"
    options = ["--ranks", "ratio:1.0", "--no-weigh", "--recalibration-images", "200"]
    arguments = [str(run), *options, "--cache-dir", str(cache), "--out", str(small)]
    assert main(["compress", *arguments]) == 0
    assert accuracy(small, tmp_path, *own) == 1
    for options, sides in (([], (24, 48)), (["--image-size", "48", "96"], (48, 96))):
        out = tmp_path / f"{sides[0]}.ijx"
        assert main(["export", str(small), "--out", str(out), *options]) == 0
        network = ij.load_exported(out)
        images = np.stack([draw(label, *sides) for label in range(9)])
        found = np.asarray(network(images)).argmax(-1)
        np.testing.assert_array_equal(found, np.arange(9) % 3)


def describe(image_size=None, resize=None):
    """A network that was trained on images of 24 x 48."""
    preprocessing = Preprocessing((HEIGHT, WIDTH, 3), (0.0,) * 3, (1.0,) * 3, resize)
    recorded = config_to_json(Config(data=Data(image_size=image_size)))
    model = ij.create_model("lenet", num_classes=3)
    return NetworkDescription(
        pathlib.Path("there"), model, preprocessing, (), {"config": recorded}
    )


@pytest.mark.parametrize("sides", [(24, 48), (48, 96)])
def test_images_to_calibrate_on_are_whole(sides, tmp_path):
    source = save_folder(tmp_path / "images", *sides, train=2, test=1)
    network = describe()
    args = Compress(
        "there", out="out", ranks="ratio:1.0", data=source, cache_dir=str(tmp_path)
    )
    split = load_training_images(args, network)
    assert split.images.shape == (6, HEIGHT, WIDTH, 3)
    augmentation = Augmentation.plain(network.preprocessing, "float32")
    seen = training_inputs(split, augmentation, 6, seed=0)
    ends = np.sort(seen[:, :, 0].mean((1, 2)))
    np.testing.assert_allclose(ends, np.repeat([0, 128 / 255, 1], 2), atol=0.02)


def test_a_checkpoint_of_any_shape_is_trained_further():
    own = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    for image_size, resize in ((None, None), ((24, 48), (30, 60)), ((24, 48), 48)):
        network = describe(image_size, resize)
        config = from_checkpoint(Config(), network, keep_data=False)
        assert config.data == Data(image_size=image_size, eval_resize=resize, **own)
    # One that was imported says no data.
    imported = dataclasses.replace(describe(), info={})
    config = from_checkpoint(Config(), imported, keep_data=False)
    assert config.data.image_size == (24, 48)


def test_the_import_of_any_shape(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    model = ij.create_model("lenet", num_classes=3, width=0.1)
    shapes = abstract_variables(model, (24, 48, 3))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    save_file(ij.to_torch(model, variables), tmp_path / "weights.safetensors")
    arguments = [str(tmp_path / "weights.safetensors"), "--model", "lenet"]
    arguments += ["--width", "0.1", "--num-classes", "3", "--image-size", "24", "48"]
    arguments += ["--mean", *("0.5",) * 3, "--std", *("0.2",) * 3]
    for resize, given in ((None, []), ((30, 60), ["30", "60"]), (48, ["48"])):
        out = tmp_path / f"checkpoint{len(given)}"
        options = ["--resize", *given] if given else []
        assert main(["import", *arguments, *options, "--out", str(out)]) == 0
        found = load_metadata(out).preprocessing
        assert (found.image_shape, found.resize) == ((24, 48, 3), resize)


def test_options_take_one_side_or_two():
    sides = ["--data.image-size", "24", "48", "--data.eval-resize", "32", "60"]
    data = parse(sides).run.data
    assert (data.image_size, data.eval_resize) == ((24, 48), (32, 60))
    assert data.load_size == (32, 60)
    data = parse(["--data.image-size", "32"]).run.data
    assert (data.image_size, data.load_size) == (32, (32, 32))
    # Equal configurations are equal, in JSON, too, however they were written.
    assert Data(image_size=(32, 32), eval_resize=(40, 40)) == Data(
        image_size=32, eval_resize=40
    )
    for name in ("image_size", "eval_resize"):
        for value, rule in (
            (0, "0"),
            ((24, 0), "0"),
            ((1, 2, 3), "one number, or two"),
        ):
            with pytest.raises(UsageError, match=rule):
                Data(**{name: value})
