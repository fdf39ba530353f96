"""Images that are held out: which, of which sources, and that none is trained on."""

import numpy as np
import pytest
from PIL import Image
from sklearn import model_selection

from train.config import Data
from train.data import load_configured, load_data
from train.data.held_out import HeldOut
from train.data.split import Rows, Split
from train.data.stratify import stratified_split
from train.errors import UsageError

RNG = np.random.default_rng(0)


def saved(tmp_path, counts=(40, 20, 10), num_test=0, name="set"):
    """Saves an archive whose images tell their number, and returns its source."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    images = np.zeros((len(labels), 4, 4, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    arrays = {"x_train": images, "y_train": labels}
    if num_test:
        arrays |= {"x_test": images[:num_test] + 128, "y_test": labels[:num_test]}
    np.savez(tmp_path / f"{name}.npz", **arrays)
    return f"npz:{tmp_path / name}.npz"


def load(source, **options):
    return load_configured(Data(source=source, mean=(0.5,), std=(0.5,), **options))


def numbers(split):
    return np.asarray(split.images)[:, 0, 0, 0].tolist()


def test_splits_are_those_of_scikit_learn():
    labels = np.repeat(np.arange(5), (31, 17, 9, 44, 20))
    for seed in range(3):
        kept, held_out = stratified_split(labels, 24, seed=seed)
        theirs = model_selection.train_test_split(
            np.arange(121), test_size=24, stratify=labels, random_state=seed
        )
        np.testing.assert_array_equal(kept, theirs[0])
        np.testing.assert_array_equal(held_out, theirs[1])


def test_every_class_keeps_an_image():
    labels = np.array([0] * 9 + [1])
    kept, held_out = stratified_split(labels, 9, seed=0)
    assert sorted(labels[kept]) == [0, 1]
    assert (labels[held_out] == 0).all() and len(held_out) == 8


def test_every_image_is_in_one_split_and_each_class_by_its_share(tmp_path):
    data = load(saved(tmp_path), test_share=0.2, validation_share=0.1)
    assert data.validation is not None
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    together = [number for split in splits.values() for number in numbers(split)]
    assert sorted(together) == list(range(70))
    counts = {k: np.bincount(s.labels).tolist() for k, s in splits.items()}
    assert counts == {"train": [28, 14, 7], "validation": [4, 2, 1], "test": [8, 4, 2]}
    for split in splits.values():  # labels still belong to their images
        order = numbers(split)
        labels = np.load(tmp_path / "set.npz")["y_train"]
        np.testing.assert_array_equal(split.labels, labels[order])
        assert order == sorted(order)


def test_draws_depend_on_their_own_seed_alone(tmp_path):
    source = saved(tmp_path)
    first = load(source, test_share=0.2)
    again = load(source, test_share=0.2, validation_share=0.3)
    other = load(source, test_share=0.2, split_seed=1)
    assert numbers(first.test) == numbers(again.test) != numbers(other.test)
    assert first.held_out == {"test": again.held_out["test"]}
    assert first.held_out != other.held_out


def test_a_set_that_holds_nothing_out_is_described_as_ever(tmp_path):
    data = load(saved(tmp_path, num_test=9))
    assert data.validation is None
    assert {*data.describe()} == {
        *("num_train", "num_test", "image_shape", "class_names")
    }


def test_a_validation_split_leaves_test_images_alone(tmp_path):
    source = saved(tmp_path, num_test=9)
    plain, held = load(source), load(source, validation_share=0.1)
    assert numbers(plain.test) == numbers(held.test)
    assert len(plain.train) == len(held.train) + len(held.validation) == 70
    assert {*held.held_out} == {"validation"}


@pytest.mark.parametrize(
    ("options", "num_test", "said"),
    [
        ({}, 0, "must hold 'x_test'.*--data.test-share 0.2"),
        ({"test_share": 0.2}, 9, "`data.test_share` (=0.2) must be 0: set has test"),
        ({"test_share": 0.001}, 0, "`data.test_share` (=0.001) must hold out an image"),
        ({"test_share": 1.0}, 0, "`data.test_share` (=1.0) must be < 1"),
        ({"test_share": -0.1}, 0, "`data.test_share` (=-0.1) must be >= 0"),
        ({"test_share": float("nan")}, 0, "`data.test_share` (=nan) must be finite"),
        (
            {"test_share": 0.6, "validation_share": 0.4},
            0,
            "(=0.6) and `data.validation_share` (=0.4) must add up to less than 1",
        ),
        ({"split_seed": 1}, 9, "`data.split_seed` (=1) does nothing without"),
    ],
)
def test_bad_shares_are_one_error(options, num_test, said, tmp_path):
    source = saved(tmp_path, num_test=num_test)
    with pytest.raises(UsageError) as caught:
        load(source, **options)
    for part in said.split(".*"):
        assert part in str(caught.value)


def folder(root, splits=("",), classes=("ant", "bee"), count=5):
    for split in splits:
        for name in classes:
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return root


def load_folder(root, **options):
    return load_data(
        f"imagefolder:{root}",
        cache_dir=str(root.parent / "cache"),
        image_size=None,
        held_out=HeldOut(**options),
    )


@pytest.mark.parametrize("splits", [("train",), ("",)])
def test_a_folder_without_test_images_holds_some_out(splits, tmp_path):
    root = folder(tmp_path / "own", splits)
    data = load_folder(root, test_share=0.4)
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    assert np.bincount(data.train.labels).tolist() == [3, 3]
    assert data.class_names == ("ant", "bee")
    # Another share takes what was decoded.
    (kept,) = (tmp_path / "cache").iterdir()
    assert len(load_folder(root, test_share=0.2).test) == 2
    assert [*(tmp_path / "cache").iterdir()] == [kept]
    with pytest.raises(UsageError, match="--data.test-share 0.2"):
        load_folder(root)


def test_a_folder_with_test_images_holds_none_out(tmp_path):
    root = folder(tmp_path / "own", ("train", "val"))
    with pytest.raises(UsageError, match="must be 0: .* in val"):
        load_folder(root, test_share=0.4)


def test_a_fingerprint_knows_images_by_name(tmp_path):
    root = folder(tmp_path / "own")
    before = load_folder(root, test_share=0.4)
    moved = load_folder(root.rename(tmp_path / "elsewhere"), test_share=0.4)
    assert before.held_out == moved.held_out
    (tmp_path / "elsewhere/ant/0.png").rename(tmp_path / "elsewhere/ant/9.png")
    after = load_folder(tmp_path / "elsewhere", test_share=0.4)
    assert after.held_out != before.held_out


def test_rows_are_read_when_they_are_asked_for():
    base = RNG.integers(256, size=(6, 2, 2, 3), dtype=np.uint8)
    rows = Rows(base, np.array([4, 1, 3]))
    whole = base[[4, 1, 3]]
    assert rows.shape == whole.shape and rows.nbytes == whole.nbytes and len(rows) == 3
    np.testing.assert_array_equal(np.asarray(rows), whole)
    for chosen in (0, slice(1, 3), np.array([2, 0])):
        np.testing.assert_array_equal(rows[chosen], whole[chosen])
    again = Split(rows, np.arange(3, dtype=np.int32)).chosen(np.array([2, 0]))
    assert again.images.base is base
    np.testing.assert_array_equal(np.asarray(again.images), base[[3, 4]])
    assert again.labels.tolist() == [2, 0]
