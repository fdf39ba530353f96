"""Files and directories that appear whole or not at all."""

import errno
import os
import pathlib
import socket
import subprocess
import sys

import pytest

import inertia_jax as ij
from inertia_jax.atomic import appearing, local_path, this_machine


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
        name = f".file.partial-{this_machine()}-{os.getpid()}"
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


def dead_process():
    """Returns the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path):
    here, dead = this_machine(), dead_process()
    # A container of the same name has other processes.
    other = f"{socket.gethostname()}-1"
    left = tmp_path / f".other.partial-{here}-{dead}"
    left.mkdir()
    (left / "arrays").mkdir()
    (tmp_path / f".file.partial-{here}-{dead}").touch()
    others = [
        f".file.partial-{here}-{os.getppid()}",
        f".file.partial-elsewhere-{dead}",
        f".file.partial-{other}-{dead}",
        f"file.partial-{here}-{dead}",
        ".notes",
    ]
    for name in others:
        (tmp_path / name).touch()
    with appearing(tmp_path / "file") as partial:
        partial.touch()
    assert names(tmp_path) == sorted(["file", *others])


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    with appearing(tmp_path / "link") as partial:
        partial.write_text("after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"


def test_a_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "file"
    path.touch(0o640)
    with appearing(path) as partial:
        partial.touch(0o600)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_a_name_may_be_as_long_as_a_file_system_allows(name, tmp_path):
    for writer in (None, "all"):
        with appearing(tmp_path / name, writer=writer) as partial:
            partial.write_text("whole")
    assert names(tmp_path) == [name]
    with pytest.raises(OSError) as found, appearing(tmp_path / f"{name}xx") as partial:
        partial.touch()
    assert found.value.errno == errno.ENAMETOOLONG


def test_errors_of_writing_name_the_file(tmp_path):
    path = tmp_path / "file"

    def fail(*arguments):
        with appearing(path) as partial:
            raise OSError(*arguments, *([str(partial)] if len(arguments) == 2 else []))

    with pytest.raises(
        OSError, match=r"^\[Errno 28\] No space left on device: '[^']*/file'$"
    ):
        fail(errno.ENOSPC, "full")
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left .*/file'$"):
        fail("128 requested and 64 written")  # as NumPy says it
    with pytest.raises(OSError, match="^another$"):
        fail("another")
    with (
        pytest.raises(FileNotFoundError, match="No such file or directory: '/no/file'"),
        appearing(path),
    ):
        open("/no/file")
    with pytest.raises(OSError, match=r"'[^']*/file'$"), appearing(path):
        with open("/dev/full", "w") as stream:  # whose error names no file
            stream.write("x")


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3:/bucket/x", "file:///x"])
def test_urls_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ValueError, match="is a URL; files are read and written by"),
        appearing(pathlib.Path(path)),
    ):
        pass
    assert names(tmp_path) == []
    url = "https://host/a.pth?x=1&y=2"
    command = r" `curl -LO 'https://host/a.pth\?x=1&y=2'` downloads it\.$"
    with pytest.raises(ValueError, match=command):
        local_path(url)
    with pytest.raises(ValueError, match=command):
        ij.load_torch(ij.create_model("lenet", width=0.1), url)
    assert local_path("a:b/c") == pathlib.Path("a:b/c")
    assert local_path("C:/x") == pathlib.Path("C:/x")


@pytest.mark.parametrize(
    ("number", "is_kept"),
    [(errno.EPERM, True), (errno.ESRCH, False), (errno.EINVAL, True)],
)
def test_what_may_be_another_users_writer_is_left(
    number, is_kept, tmp_path, monkeypatch
):
    def kill(process, signal):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "kill", kill)
    rest = tmp_path / f".other.partial-{this_machine()}-123456"
    rest.write_text("half")
    with appearing(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert rest.exists() == is_kept
