"""Sources, and what they refuse."""

import os
import struct
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from helpers import PREPARE
from PIL import Image
from sklearn import datasets, model_selection

from inertia_jax.metadata import both_sides
from train.config import Data
from train.data import load_configured, load_data, tfds
from train.data.cache import cached_set
from train.errors import UsageError

RNG = np.random.default_rng(0)


# Where nothing can be written.
NOWHERE = f"{os.devnull}/unused"


def load(source, cache_dir=NOWHERE, image_size=None):
    return load_data(source, cache_dir=str(cache_dir), image_size=image_size)


def arrays(n=20, shape=(8, 8, 3), **changes):
    made = {
        "x_train": RNG.integers(256, size=(n, *shape), dtype=np.uint8),
        "y_train": np.arange(n) % 3,
        "x_test": RNG.integers(256, size=(5, *shape), dtype=np.uint8),
        "y_test": np.arange(5) % 3,
    }
    made |= changes
    return {key: value for key, value in made.items() if value is not None}


def test_digits_are_split_with_all_classes():
    data = load("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.image_shape == (8, 8, 1)
    assert data.train.images.max() == 255
    assert set(np.bincount(data.test.labels)) <= {33, 34, 35, 36, 37}
    np.testing.assert_array_equal(load("digits").test.images, data.test.images)


def test_digits_are_those_of_scikit_learn():
    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    data = load("digits")
    np.testing.assert_array_equal(data.train.images, x_train)
    np.testing.assert_array_equal(data.train.labels, y_train)
    np.testing.assert_array_equal(data.test.images, x_test)
    np.testing.assert_array_equal(data.test.labels, y_test)


def test_npz_reads_keras_keys(tmp_path):
    made = arrays(y_train=(np.arange(20) % 3)[:, None])
    np.savez(tmp_path / "set.npz", label_names=["x", "y", "z", "w"], **made)
    data = load(f"npz:{tmp_path / 'set.npz'}")
    np.testing.assert_array_equal(data.train.images, made["x_train"])
    np.testing.assert_array_equal(data.train.labels, np.arange(20) % 3)
    assert data.class_names == ("x", "y", "z", "w")


def test_npz_of_gray_images_and_without_training_images(tmp_path):
    made = arrays(shape=(8, 8), x_train=None, y_train=None)
    np.savez(tmp_path / "set.npz", **made)
    data = load(f"npz:{tmp_path / 'set.npz'}")
    assert data.train is None
    assert data.image_shape == (8, 8, 1)
    assert data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((20, 8, 8, 3), np.float32)}, "float32; must be uint8"),
        (
            {"x_train": np.zeros((20, 8, 8, 4), np.uint8)},
            r"must be \[n, h, w, 1 or 3\]",
        ),
        ({"x_train": np.zeros((20, 9, 9, 3), np.uint8)}, "must be of one shape"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8)}, "no images"),
        ({"y_train": np.arange(19)}, "labels have shape"),
        ({"y_train": np.ones(20)}, "labels have type"),
        ({"y_train": np.arange(20)}, r"span \[0, 19\]; must be in \[0, 2\]"),
        ({"y_test": np.arange(5) - 1}, r"span \[-1, 3\]"),
        ({"y_test": None}, "must hold 'y_test'"),
        ({"y_test": np.array(list("abcde"))}, "labels have type"),
        ({"x_test": np.zeros((5, 0, 8, 3), np.uint8)}, "must have pixels"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, changes, message):
    made = arrays(label_names=["a", "b", "c"], **changes)
    np.savez(tmp_path / "set.npz", **made)
    with pytest.raises(UsageError, match=message):
        load(f"npz:{tmp_path / 'set.npz'}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": np.array(list("abcde"))}, "labels have type"),
        ({"y_train": np.full(20, np.nan)}, "labels have type"),
        ({"y_test": np.arange(5) * 10**6}, "label 4000000; must be below 100000"),
        ({"label_names": np.array("abc")}, r"shape \(\); must be \[classes\]"),
    ],
)
def test_classes_without_names_come_from_sound_labels(tmp_path, changes, message):
    np.savez(tmp_path / "set.npz", **arrays(**changes))
    with pytest.raises(UsageError, match=message):
        load(f"npz:{tmp_path / 'set.npz'}")


def test_one_class_is_read_but_not_trained_on(tmp_path):
    zeros = {"y_train": np.zeros(20, int), "y_test": np.zeros(5, int)}
    np.savez(tmp_path / "set.npz", **arrays(**zeros))
    source = f"npz:{tmp_path / 'set.npz'}"
    assert load(source).num_classes == 1
    with pytest.raises(UsageError, match="one class; training needs two or more"):
        load_configured(Data(source=source, cache_dir=NOWHERE))


def test_names_of_bytes_are_names(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(label_names=[b"a", b"b", b"c"]))
    assert load(f"npz:{tmp_path / 'set.npz'}").class_names == ("a", "b", "c")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_error_about_an_archive_names_its_file(save, tmp_path):
    file, rng = tmp_path / "set.npz", np.random.default_rng(0)
    save(file, **arrays())
    content = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(300):
        damaged = content.copy()
        # Headers are at the file's ends.
        places = rng.integers(-300, 300, size=3)
        damaged[places] ^= (1 << rng.integers(8, size=3)).astype(np.uint8)
        file.write_bytes(damaged[: rng.choice([len(damaged), 200, 2000])])
        try:
            load(f"npz:{file}")
        except UsageError as error:
            assert str(error).startswith((str(file), "set ")), error
            assert len(str(error)) < 500


def header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"\n"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"no array", "holds 'y_test', which is no array"),
        (header("{'descr': ("), "no NumPy archive: "),
        (
            header(f"{{'descr': 'u1', 'fortran_order': False, 'shape': ({10**400},)}}"),
            "no NumPy archive: ",
        ),
        (
            header(f"{{'descr': 'u1', 'fortran_order': False, 'shape': ({2**60},)}}"),
            "no NumPy archive: Unable to allocate 1.00 EiB",
        ),
    ],
)
def test_arrays_that_somebody_made_are_refused(member, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("y_test.npy", member)
    with pytest.raises(UsageError, match=message) as caught:
        load(f"npz:{tmp_path / 'set.npz'}")
    assert len(str(caught.value)) < 500


def test_arrays_that_are_not_asked_for_are_not_read(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    shape = header(f"{{'descr': 'u1', 'fortran_order': False, 'shape': ({2**60},)}}")
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.writestr("index_train.npy", shape)
    assert load(f"npz:{tmp_path / 'set.npz'}").num_classes == 3


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="no file .*none.npz.*x_train"):
        load(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "broken.npz").write_bytes(b"broken")
    with pytest.raises(UsageError, match="no NumPy archive"):
        load(f"npz:{tmp_path / 'broken.npz'}")
    for source in ("npz:", "csv:x", "cifar-10", ""):
        with pytest.raises(UsageError, match="must be tfds:NAME"):
            load(source)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((10, 12, 3), 40 * index + 100 * label, np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return root


def test_an_image_folder_is_read_resized_and_cached(folder, tmp_path):
    cache = tmp_path / "cache"
    data = load(f"imagefolder:{folder}", cache, image_size=5)
    assert data.class_names == ("cat", "dog")
    assert data.image_shape == (5, 5, 3)
    np.testing.assert_array_equal(data.train.labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(data.test.images[:, 2, 2, 0], [0, 40, 100, 140])
    assert isinstance(load(f"imagefolder:{folder}", cache, 5).train.images, np.memmap)
    (folder / "train" / ".hidden").mkdir()
    assert load(f"imagefolder:{folder}", cache, 5).class_names == ("cat", "dog")
    # Another file is another set.
    Image.new("RGB", (10, 12)).save(folder / "train" / "dog" / "new.png")
    assert len(load(f"imagefolder:{folder}", cache, 5).train) == 7


@pytest.mark.parametrize(
    ("image_size", "rows", "columns"),
    [((10, 12), 10, 12), ((5, 6), 5, 6), ((4, 10), 8, 10), (5, 5, 6), (None, 10, 12)],
)
def test_the_images_of_a_folder_are_brought_to_both_sides(
    image_size, rows, columns, folder, tmp_path
):
    ramp = np.zeros((10, 12, 3), np.uint8) + 20 * np.arange(12, dtype=np.uint8)[:, None]
    Image.fromarray(ramp).save(folder / "train" / "cat" / "0.png")
    data = load(f"imagefolder:{folder}", tmp_path / "cache", image_size)
    height, width = both_sides(image_size or (10, 12))
    resized = Image.fromarray(ramp).resize((columns, rows), Image.Resampling.BILINEAR)
    top, left = (rows - height) // 2, (columns - width) // 2
    expected = np.asarray(resized)[top : top + height, left : left + width]
    np.testing.assert_array_equal(data.train.images[0], expected)


@pytest.mark.parametrize(
    ("image_size", "name"), [(32, "32"), ((32, 32), "32"), ((24, 48), "24x48")]
)
def test_the_cache_of_a_set_says_both_sides(image_size, name, tmp_path):
    images, labels = np.zeros((2, 3, 3, 1), np.uint8), np.arange(2)
    kept = {"train": (images, labels), "test": (images, labels)}, ("a", "b")
    cached_set(tmp_path / f"tfds-flowers-{name}", "flowers", lambda: kept)
    assert len(load("tfds:flowers", tmp_path, image_size).test) == 2


def test_tfds_brings_images_to_both_sides():
    example = {"image": np.full((10, 12, 3), 7, np.uint8), "label": 1}
    builder = types.SimpleNamespace(as_data_source=lambda split: [example] * 2)
    images, labels = tfds._decode_split("flowers", builder, "train", (4, 8))
    assert images.shape == (2, 4, 8, 3) and list(labels) == [1, 1]


def test_the_first_of_two_that_cache_a_set_is_kept(tmp_path):
    directory = tmp_path / "cache" / "set"

    def decoded(value):
        images, labels = np.full((2, 3, 3, 1), value, np.uint8), np.arange(2)
        return {"train": (images, labels), "test": (images, labels)}, ("a", "b")

    def decode_late():
        cached_set(directory, "set", lambda: decoded(1))
        return decoded(2)

    late = cached_set(directory, "set", decode_late)
    assert (late.train.images == 1).all()
    assert [path.name for path in directory.parent.iterdir()] == ["set"]


def test_a_set_that_cannot_be_cached_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, array):
        raise OSError(28, "No space left on device")

    images = np.zeros((2, 3, 3, 1), np.uint8)
    splits = {split: (images, np.arange(2)) for split in ("train", "test")}
    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        cached_set(tmp_path / "set", "set", lambda: (splits, ("a", "b")))
    assert not list(tmp_path.iterdir())


def test_bad_image_folders_are_refused(folder, tmp_path):
    source, cache = f"imagefolder:{folder}", tmp_path / "cache"
    Image.new("RGB", (9, 9)).save(folder / "train" / "dog" / "small.png")
    with pytest.raises(UsageError, match=r"small.png has shape .*data.image_size"):
        load(source, cache)
    deep = Image.fromarray(np.zeros((10, 12), np.uint16))
    deep.save(folder / "train" / "dog" / "small.png")
    with pytest.raises(UsageError, match=r"small.png has pixels of mode 'I;16'"):
        load(source, cache, 5)
    (folder / "train" / "dog" / "small.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"cannot read .*small.png"):
        load(source, cache, 5)
    (folder / "val" / "bird").mkdir()
    with pytest.raises(UsageError, match=r"classes \['bird'\]"):
        load(source, cache, 5)
    (folder / "val" / "bird").rmdir()
    (folder / "train" / "fish").mkdir()
    with pytest.raises(UsageError, match=r"no images in .*fish"):
        load(source, cache, 5)
    with pytest.raises(UsageError, match="needs PATH/train/CLASS"):
        load(f"imagefolder:{tmp_path / 'none'}", cache, 5)
    assert not cache.exists() or not list(cache.iterdir())


# CIFAR's own binary files, small; only the download is replaced.
READ = """
import shutil, sys
from importlib.machinery import PathFinder
class Hider:
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in sys.argv[3].split(","):
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path = [Hider if f is PathFinder else f for f in sys.meta_path]
from train.data import load_data
from train.data.cache import cached_set
data = load_data(f"tfds:{sys.argv[1]}", cache_dir=sys.argv[2], image_size=None)
print(len(data.train), len(data.test))
"""


def run_python(code, *args, env):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**env, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_prepares_with_tensorflow_and_reads_without(
    name, tmp_path, subprocess_env
):
    for package in ("tensorflow", "tensorflow_datasets", "array_record"):
        pytest.importorskip(package, reason="needs TFDS: the extra `tfds`")
    cache = tmp_path / "cache"
    made = run_python(PREPARE, tmp_path / "raw", name, cache, env=subprocess_env)
    assert made.returncode == 0, made.stderr[-3000:]
    # From the prepared array_record files, without TensorFlow.
    for file in (cache / f"tfds-{name}").iterdir():
        file.unlink()
    (cache / f"tfds-{name}").rmdir()
    read = run_python(READ, name, cache, "tensorflow", env=subprocess_env)
    assert read.returncode == 0, read.stderr[-3000:]
    assert read.stdout.split() == ["30", "7"]
    # From our own cache, without TFDS.
    blocked = "tensorflow,tensorflow_datasets,array_record"
    read = run_python(READ, name, cache, blocked, env=subprocess_env)
    assert read.stdout.split() == ["30", "7"], read.stderr[-3000:]


def test_tfds_says_what_to_install(tmp_path, subprocess_env):
    result = run_python(
        READ, "cifar10", tmp_path, "tensorflow_datasets", env=subprocess_env
    )
    assert "pip install '.[tfds]' in the checkout" in result.stderr


OFFLINE = """
import socket, sys
def fail(*args, **kwargs):
    raise socket.gaierror(-2, "Name or service not known")
socket.getaddrinfo = fail
from train.data import load_data
from train.data.cache import cached_set
load_data(f"tfds:{sys.argv[1]}", cache_dir=sys.argv[2], image_size=None)
"""


@pytest.mark.slow
def test_tfds_without_a_network_says_what_to_do(tmp_path, subprocess_env):
    for package in ("tensorflow", "tensorflow_datasets", "array_record"):
        pytest.importorskip(package, reason="needs TFDS: the extra `tfds`")
    for name, host in (("cifar10", "www.cs.toronto.edu"), ("mnist", "storage.google")):
        start = time.monotonic()
        result = run_python(OFFLINE, name, tmp_path, env=subprocess_env)
        # TensorFlow takes half of it to import; ten tries take 200 s.
        assert time.monotonic() - start < 90
        # Other downloads of the same set may warn after it.
        (line,) = [
            x
            for x in result.stderr.splitlines()
            if "OSError" in x or "UsageError: " in x
        ][-1:]
        assert f"could not download and prepare {name}: {host}" in line
        assert "cannot be reached; without a network, prepare it on" in line
    unknown = run_python(OFFLINE, "cifar01", tmp_path, env=subprocess_env)
    assert "has no data set 'cifar01'. Did you mean cifar10?" in unknown.stderr


@pytest.mark.parametrize(
    ("source", "cache_dir"),
    [
        ("npz:gs://bucket/set.npz", "cache"),
        ("imagefolder:s3://bucket/images", "cache"),
        ("tfds:cifar10", "gs://bucket/cache"),
        ("digits", "gs://bucket/cache"),
    ],
)
def test_urls_are_refused(source, cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a URL; files are read and written by"):
        load(source, cache_dir)
    assert not list(tmp_path.iterdir())
