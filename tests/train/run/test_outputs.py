"""Files of results."""

import json

import pytest

from train.errors import UsageError
from train.run.outputs import check_output_file, write_json


def test_a_file_is_written_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check_output_file("out", "~/found.json")
    write_json("~/found.json", {"top1": 0.5})
    assert json.loads((tmp_path / "found.json").read_text()) == {"top1": 0.5}


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    write_json(None, {})
    with pytest.raises(UsageError, match="No such file or directory"):
        write_json(tmp_path / "none" / "found.json", {})
