"""Names of image sets: kinds that are left out, and near misses."""

import pytest

from train.arguments import parse_options
from train.compress.options import Compress
from train.data import load_data
from train.errors import UsageError
from train.options.fit import parse
from train.sources import complete_source, describe_near


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "mnist"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "full"),
    [
        ("/x.npz", "npz:/x.npz"),
        ("a:b.npz", "npz:a:b.npz"),
        ("cifar10", "tfds:cifar10"),
        ("mnist:3.0.1", "tfds:mnist:3.0.1"),
        ("cifar10:3.0.2", "tfds:cifar10:3.0.2"),
        ("folder", "imagefolder:folder"),
        ("folder/", "imagefolder:folder/"),
        ("mnist/", "imagefolder:mnist/"),
        ("mnist", "mnist"),
        ("digits", "digits"),
        ("tfds:cifar10", "tfds:cifar10"),
        ("npz:folder", "npz:folder"),
        ("imagefolder:x.npz", "imagefolder:x.npz"),
        ("nothing", "nothing"),
        ("", ""),
    ],
)
def test_a_kind_is_left_out_where_it_is_plain(source, full, here):
    assert complete_source(source) == full
    assert parse(["--data", source]).run.data.source == full
    assert complete_source(full) == full


def test_every_option_of_data_is_completed_and_said(here, capsys):
    words = ["x", "--out", "o", "--data", "folder", "--also-test", "x.npz", "cifar10"]
    args = parse_options(Compress, words, verb="compress")
    assert args.data == "imagefolder:folder"
    assert args.also_test == ("npz:x.npz", "tfds:cifar10")
    with pytest.raises(UsageError, match=r"there is no file x\.npz"):
        load_data("x.npz", cache_dir="cache", image_size=None)
    assert capsys.readouterr().err == "reading npz:x.npz\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("cifar-10", "Did you mean tfds:cifar10?"),
        ("digit", "Did you mean digits?"),
        ("tdfs:cifar10", "Did you mean tfds?"),
        ("mnist", "Is it imagefolder:mnist or tfds:mnist?"),
        ("./none", "There is nothing at ./none."),
        ("npz:", ""),
        ("~no-such-user/x", "There is nothing at ~no-such-user/x."),
        ("x" * 300, ""),
    ],
)
def test_what_was_meant_is_said(source, words, here):
    assert describe_near(source).strip() == words
    with pytest.raises(UsageError, match="must be tfds:NAME") as error:
        load_data(source, cache_dir="cache", image_size=None)
    assert str(error.value).endswith(words)


@pytest.mark.parametrize(
    ("source", "cache_dir"),
    [
        ("~no-such-user/x.npz", "cache"),
        ("imagefolder:~no-such-user/x", "cache"),
        ("tfds:cifar10", "~no-such-user/x"),
    ],
)
def test_the_home_of_no_user_is_an_error_of_one_line(source, cache_dir, here):
    with pytest.raises(UsageError, match="^~no-such-user/x.* is in the home of a user"):
        load_data(source, cache_dir=cache_dir, image_size=None)
