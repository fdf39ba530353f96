"""A run's checkpoints: what is no checkpoint is put aside, and the one before taken."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import make_odd

import inertia_jax as ij
from inertia_jax.checkpoint import verify_checkpoint
from inertia_jax.metadata import Metadata
from train.errors import UsageError
from train.run.checkpoints import Checkpoints, latest_steps

ODD = ["directory", "pipe", "loop", "missing"]


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    model = ij.create_model("lenet", width=0.2)
    for step in (10, 20):
        training = {"step": np.int32(step)}
        checkpoints.save(step, model, {"params": {}}, training, Metadata())
    checkpoints.wait()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("kind", [*ODD, "deeply nested", "list"])
def test_a_manifest_of_any_kind_is_damage(kind, saved, capsys):
    manifest = saved / "step_00000020" / "manifest.json"
    manifest.unlink()
    make_odd(kind, manifest)
    path, arrays = Checkpoints(saved).restore()
    assert path.name == "step_00000010" and arrays["training"]["step"] == 10
    assert "step_00000020 is put aside" in capsys.readouterr().err
    assert latest_steps(saved) == [10]


@pytest.mark.parametrize("name", ["metadata.json", "arrays", "."])
@pytest.mark.parametrize("kind", ODD)
def test_other_parts_of_any_kind_are_damage(name, kind, saved, capsys):
    part = saved / "step_00000020" / name
    part.rename(saved / "elsewhere")
    make_odd(kind, part)
    path, _ = Checkpoints(saved).restore()
    assert path.name == "step_00000010"
    missing = name == "." and kind == "missing"
    assert ("step_00000020 is put aside" in capsys.readouterr().err) != missing


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "list"])
def test_what_was_put_aside_before_makes_way(kind, saved):
    (saved / "step_00000020" / "manifest.json").unlink()
    make_odd(kind, saved / "damaged_step_00000020")
    Checkpoints(saved).restore()
    assert (saved / "damaged_step_00000020" / "metadata.json").is_file()


def test_a_kill_leaves_no_half_of_what_is_deleted(saved, monkeypatch):
    checkpoints, model = Checkpoints(saved), ij.create_model("lenet", width=0.2)
    monkeypatch.setattr("train.run.checkpoints.remove", lambda path: None)
    checkpoints.save(30, model, {"params": {}}, {"step": np.int32(30)}, Metadata())
    checkpoints.wait()
    assert latest_steps(saved) == [20, 30]
    assert len(list(saved.glob(".step_00000010*"))) == 1
    monkeypatch.undo()
    Checkpoints(saved)
    assert not list(saved.glob(".step_*"))


def test_other_names_are_no_checkpoints(saved, capsys):
    for name in (
        "step_30",
        "step_000000040",
        "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0665\u0660",
        "step_00000060.old",
    ):
        (saved / name).mkdir()
    (saved / ".step_00000030.partial-all").write_text("")  # of a killed run
    path, _ = Checkpoints(saved).restore()
    assert path.name == "step_00000020" and not capsys.readouterr().err
    assert not list(saved.glob(".step_*"))


def test_checkpoints_under_each_others_names_are_refused_and_left(saved):
    first, last = saved / "step_00000010", saved / "step_00000020"
    first.rename(saved / "aside")
    last.rename(first)
    (saved / "aside").rename(last)
    with pytest.raises(UsageError, match="00000020 holds the checkpoint of step 10:"):
        Checkpoints(saved).restore()
    assert latest_steps(saved) == [10, 20]


def test_a_checkpoint_in_the_place_of_the_next_is_one_error(saved):
    checkpoints, model = Checkpoints(saved), ij.create_model("lenet", width=0.2)
    checkpoints.save(20, model, {"params": {}}, {}, Metadata())
    with pytest.raises(UsageError, match="step_00000020.* must not exist"):
        checkpoints.wait()


def test_a_description_of_any_depth_is_one_error(saved):
    (saved / "step_00000020" / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        ij.load_metadata(saved / "step_00000020")


# A program: writes checkpoints until the disk is full.
FILLING = """
import os, sys, time
import numpy as np
import inertia_jax as ij
from train.errors import in_words, leave_to_caller
leave_to_caller()
model, disk = ij.create_model("lenet", width=0.2), sys.argv[1]
arrays = {str(i): np.random.default_rng(i).normal(size=9999) for i in range(20)}
for room in (4096, 65536, 300_000):
    free = os.statvfs(disk)
    with open(f"{disk}/ballast", "wb") as file:
        file.write(bytes(max(free.f_bavail * free.f_bsize - room, 0)))
    try:
        ij.save_checkpoint(f"{disk}/{room}", model, {"params": arrays})
    except ij.CheckpointWriteError as error:
        print(in_words(error))
    time.sleep(0.5)  # for threads that have something to say
    os.remove(f"{disk}/ballast")
# What a thread writes after all was removed is hidden, and is removed by the next.
assert all(name.startswith(".") for name in os.listdir(disk)), os.listdir(disk)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path, subprocess_env):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root, to mount a small disk")
    try:
        found = subprocess.run(
            [sys.executable, "-c", FILLING, str(disk)],
            env=subprocess_env,
            cwd=pathlib.Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert found.returncode == 0, found.stdout
    assert found.stdout.splitlines() == [
        f"could not write {disk}/{room}: No space left on device; free some space, "
        f"then run the same command again"
        for room in (4096, 65536, 300_000)
    ]


def test_an_error_that_names_the_checkpoint_is_raised(tmp_path):
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    (tmp_path / "file").write_text("")
    model = ij.create_model("lenet", width=0.2)
    checkpoints.save(10, model, {"params": {}}, {}, Metadata())
    with pytest.raises(UsageError, match="step_00000010: Not a directory"):
        checkpoints.wait()
    with pytest.raises(FileNotFoundError):
        verify_checkpoint(tmp_path / "none")
