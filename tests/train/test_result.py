"""One object on standard output, where `--json` asks for it."""

import json
import pathlib

import numpy as np
import pytest
from helpers import FIT_ONE, save_bright_digits

from train.__main__ import VERBS, main
from train.result import add_result, printed_as_json

pytestmark = pytest.mark.usefixtures("one_device")


# What `completion` refuses, the parser does.
@pytest.mark.parametrize(
    "verb", [v for v in VERBS if v not in ("models", "quickstart", "completion")]
)
def test_what_is_refused_is_an_object_too(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {
        "import": ["--model", "lenet", "--mean", "0.5", "--std", "2", "--out", "x"],
        "compress": ["--ranks", "ratio:0.5", "--out", "x"],
        "export": ["--out", "x.ijx"],
        "sweep": ["--out", "x.jsonl"],
        "diff": ["also nowhere"],
        "predict": ["x.png"],
    }
    words = ["nowhere", *options.get(verb, [])]
    if verb in ("fit", "benchmark"):
        words = ["--batch-size", "0"]
    assert main([verb, *words, "--json"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["verb"], found["exit_code"]) == (verb, 2)
    assert f"error: {found['error']}\n" in said.err


def test_options_that_the_parser_refuses_are_an_object_too(capsys):
    with pytest.raises(SystemExit):
        main(["--json", "fit", "--no-such-option"])
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 2 and "refused" in found["error"]


def test_numbers_and_paths_are_those_of_json(capsys):
    with printed_as_json("x"):
        print("for people")
        add_result({"a": np.float32(0.5), "b": np.nan, "c": pathlib.Path("d/e")})
        add_result({"f": (np.arange(2), {1: float("inf")}), "a": 0.25})
    said = capsys.readouterr()
    assert said.err == "for people\n"
    assert json.loads(said.out) == {
        **{"verb": "x", "exit_code": 0, "error": None, "a": 0.25, "b": None},
        **{"c": "d/e", "f": [[0, 1], {"1": None}]},
    }


@pytest.mark.slow
def test_runs_and_evaluations_are_objects(tmp_path, capsys):
    source = save_bright_digits(tmp_path / "set.npz", 64, 16, 8)
    run = tmp_path / "run"
    assert main([*FIT_ONE, "--data", source, "--workdir", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["workdir"], found["step"]) == (str(run), 4)
    assert found["best_checkpoint"].startswith(str(run))
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["top1"] == found["last"]["top1"]
    assert again["checkpoint"] == found["best_checkpoint"]
    assert again["params"] > 0 and again["macs"] > 0
