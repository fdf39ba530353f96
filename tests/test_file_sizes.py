"""What `.ci/run` says of files that are too large for a repository."""

import importlib.util
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location(
    "file_sizes", ROOT / ".ci" / "file_sizes.py"
)
file_sizes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(file_sizes)


@pytest.fixture(autouse=True)
def _no_outer_repository(monkeypatch):
    """Takes away what git sets in a hook, which names a repository to write to."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def repository(tmp_path):
    """A repository of one commit, and a function that runs git in it."""

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True)

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git("init", "-q")
    (tmp_path / "a file").write_bytes(bytes(1_500_000))
    git("add", ".")
    git("commit", "-qm", "first")
    return tmp_path, git


def test_files_up_to_the_limit_pass(repository, capsys):
    root, _ = repository
    assert file_sizes.main(root) == 0
    said = capsys.readouterr().out
    assert said == (
        "file sizes: looked at tracked files and 1 commits, the whole history\n"
    )


def test_a_tracked_file_before_its_commit_is_found(repository, capsys):
    root, git = repository
    (root / "große data.npz").write_bytes(bytes(1_500_001))
    assert file_sizes.main(root) == 0  # git does not track it
    git("add", ".")
    assert file_sizes.main(root) == 1
    assert "file sizes: große data.npz: 1,500,001 bytes" in capsys.readouterr().out


def test_a_file_that_a_later_commit_removes_is_found(repository, capsys, monkeypatch):
    root, git = repository
    large = root / "--help" / "set.npz"
    large.parent.mkdir()
    large.write_bytes(bytes(2_000_000))
    git("add", ".")
    git("commit", "-qm", "adds")
    git("rm", "-q", "--", "./--help/set.npz")
    git("commit", "-qm", "removes")
    assert file_sizes.main(root) == 1
    said = capsys.readouterr().out
    assert "--help/set.npz: 2,000,000 bytes" in said
    assert "3 commits" in said
    (line,) = file_sizes.large_files(root)
    known = {line.partition("(")[2].removesuffix(")")}
    monkeypatch.setattr(file_sizes, "KNOWN", known)
    assert file_sizes.main(root) == 0
    large.parent.mkdir()
    large.write_bytes(bytes(2_000_000))
    git("add", ".")
    assert file_sizes.main(root) == 1  # known, but tracked again


def test_paths_of_any_bytes_are_looked_at(repository, capsys):
    root, git = repository
    (root / os.fsdecode(b"\xff\r\xc2\x85 set missing")).write_bytes(bytes(1_500_001))
    git("add", ".")
    assert file_sizes.main(root) == 1
    assert "set missing: 1,500,001 bytes" in capsys.readouterr().out


def test_a_file_that_git_lacks_is_named(repository, capsys, monkeypatch):
    root, _ = repository
    run, lost = file_sizes._git, "1" * 40

    def lists_lost(root, *arguments, **options):
        more = f"{lost} a lost file\n" if "--objects" in arguments else ""
        return run(root, *arguments, **options) + more

    monkeypatch.setattr(file_sizes, "_git", lists_lost)
    assert file_sizes.main(root) == 1
    assert f"file sizes: {lost} missing, so that" in capsys.readouterr().out


def test_a_shallow_checkout_says_that_it_is(repository, tmp_path_factory, capsys):
    root, git = repository
    git("commit", "-q", "--allow-empty", "-m", "second")
    shallow = tmp_path_factory.mktemp("shallow") / "clone"
    git("clone", "-q", "--depth", "1", f"file://{root}", str(shallow))
    assert file_sizes.main(shallow) == 0
    said = capsys.readouterr().out
    assert "1 commits, all that this shallow checkout has" in said


def test_without_git_nothing_is_looked_at(tmp_path, capsys):
    assert file_sizes.main(tmp_path) == 0
    assert "nothing was looked at" in capsys.readouterr().out
