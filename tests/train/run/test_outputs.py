"""Files of results."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from train.__main__ import main
from train.errors import UsageError
from train.run.outputs import check_output, check_output_file, write_json
from train.run.report import draw_curve


def test_a_file_is_written_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check_output_file("out", "~/found.json")
    write_json("~/found.json", {"top1": 0.5})
    assert json.loads((tmp_path / "found.json").read_text()) == {"top1": 0.5}


def test_what_documented_commands_write_is_ignored_by_git():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git and the repository")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    places = set(re.findall(r"--(?:out|workdir) ([a-z][\w./]*)", text))
    # Records are kept; what else a person names is their own.
    places = {p for p in places if not p.startswith("results/")} - {"evaluation.json"}
    assert {"checkpoints/half", "half.ijx"} <= places
    for place in (*places, "runs/finetune_half"):
        found = subprocess.run(["git", "check-ignore", "-q", place], cwd=ROOT)
        assert found.returncode == 0, place


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    write_json(None, {})
    with pytest.raises(UsageError, match="No such file or directory"):
        write_json(tmp_path / "none" / "found.json", {})


def test_a_file_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "found.json"
    write_json(file, {"top1": 0.5})
    before = file.read_bytes()

    def write_half(path, text):
        with path.open("w") as stream:
            stream.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_text", write_half)
    with pytest.raises(UsageError) as found:
        write_json(file, {"top1": 0.75})
    assert str(found.value) == (
        f"{file}: No space left on device; free some space, then run the same command "
        f"again"
    )
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["found.json"]


def test_a_curve_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    row = {"epoch": 1, "train_accuracy": 0.5, "test_top1": 0.5}
    row |= {"train_loss": 1.0, "test_loss": 1.0}
    record = {"config": {"name": "run"}, "curve": [row]}
    for name in ("curve.png", "curve.svg"):
        draw_curve(record, tmp_path / name)
    before = (tmp_path / "curve.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()

    def save_half(figure, path, **_):
        pathlib.Path(path).write_bytes(before[:99])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_half)
    with pytest.raises(UsageError, match="curve.png: No space left on device; free"):
        draw_curve(record, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == before


def test_what_is_no_file_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, [1])
    assert json.loads(os.read(reader, 100)) == [1]
    os.close(reader)
    assert pipe.is_fifo()
    write_json("/dev/null", [1])
    assert pathlib.Path("/dev/null").is_char_device()


@pytest.mark.parametrize("path", ["gs://bucket/x.json", "s3://x.json", "hdfs:/a/b"])
def test_urls_are_refused(path):
    for call in (lambda: check_output("out", path), lambda: write_json(path, {})):
        with pytest.raises(UsageError, match="is a URL; files are read and written by"):
            call()


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    for check in (check_output, check_output_file):
        with pytest.raises(UsageError, match="x: File name too long"):
            check("out", tmp_path / ("x" * 300))


def test_the_directory_of_a_file_that_is_replaced_must_take_files(
    tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path == file)
    with pytest.raises(UsageError, match="cannot be written"):
        check_output_file("out", file)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--workdir", "gs://bucket/run"],
        ["fit", "--workdir=s3://bucket/run", "--resume"],
        ["fit", "--data.source", "imagefolder:gs://bucket/images"],
        ["evaluate", "gs://bucket/run"],
        ["evaluate", "runs/x", "--out", "https://host/x.json"],
        ["compress", "runs/x", "--ranks", "ratio:0.5", "--out", "s3://bucket/x"],
        ["import", "hdfs://weights.pth", "--out", "x"],
        ["report", "gs://bucket/run"],
        ["sweep", "x.py", "--out", "x.jsonl", "--workdir", "gs://bucket"],
        ["quickstart", "--workdir", "file:///tmp/run"],
        ["benchmark", "--suite", "ops", "--out", "gs://bucket/x"],
    ],
)
def test_every_verb_refuses_urls(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert "is a URL; files are read and written by paths of this machine" in told
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    value = {"loss": float("nan"), "rows": [float("inf"), 1.5], "path": tmp_path}
    write_json(tmp_path / "found.json", value)
    text = (tmp_path / "found.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    expected = {"loss": None, "rows": [None, 1.5], "path": str(tmp_path)}
    assert json.loads(text) == expected
