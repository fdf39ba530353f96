"""Files and directories that appear whole or not at all."""

import os
import socket

import pytest

from inertia_jax.atomic import appearing


def names(directory):
    return sorted(path.name for path in directory.rglob("*"))


def test_a_file_appears_at_the_end_and_replaces_another(tmp_path):
    path = tmp_path / "below" / "file"
    for text in ("first", "second"):
        with appearing(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names(tmp_path) == ["below", "file"]


def test_a_directory_appears_at_the_end_and_replaces_none(tmp_path):
    path = tmp_path / "directory"

    def write(text):
        with appearing(path) as partial:
            partial.mkdir()
            (partial / "file").write_text(text)
            assert text == "second" or not path.exists()

    write("first")
    with pytest.raises(OSError, match="directory"):
        write("second")
    assert (path / "file").read_text() == "first"
    assert names(tmp_path) == ["directory", "file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(error), appearing(path) as partial:
        partial.write_text("half")
        raise error
    with pytest.raises(error), appearing(tmp_path / "directory") as partial:
        partial.mkdir()
        (partial / "file").write_text("half")
        raise error
    assert path.read_text() == "before" and names(tmp_path) == ["file"]


def test_a_killed_writers_rest_is_removed(tmp_path):
    path = tmp_path / "made"
    rest = tmp_path / ".made.partial-all"
    for make in (rest.mkdir, rest.touch):
        make()
        with appearing(path, writer="all") as partial:
            assert partial == rest and not rest.exists()
            partial.write_text("whole")
        assert names(tmp_path) == ["made"]


def test_writers_on_one_disk_have_places_of_their_own(tmp_path):
    with appearing(tmp_path / "file") as partial:
        name = f".file.partial-{socket.gethostname()}-{os.getpid()}"
        assert partial == tmp_path / name
        with appearing(tmp_path / "file", writer="other") as other:
            other.write_text("other")
        partial.write_text("own")
    assert (tmp_path / "file").read_text() == "own"


def test_a_process_that_does_not_commit_only_learns_the_place(tmp_path):
    path = tmp_path / "below" / "directory"
    with appearing(path, writer="all", commits=False) as partial:
        assert names(tmp_path) == []
    with appearing(path, writer="all") as made:
        assert made == partial
        made.mkdir()
        with appearing(path, writer="all", commits=False) as shared:
            (shared / "share").touch()
        assert names(made) == ["share"] and not path.exists()
    assert names(path) == ["share"]
    with pytest.raises(OSError), appearing(path, writer="all", commits=False):
        made.mkdir()
        raise OSError  # the process that commits removes, no other
    assert made.is_dir()
