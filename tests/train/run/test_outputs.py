"""Files of results."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from train.errors import UsageError
from train.run.outputs import check_output_file, write_json


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
