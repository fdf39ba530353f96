"""Options in every spelling that people use, and the help."""

import dataclasses
import os
from typing import Annotated

import pytest
import tyro

from train.__main__ import VERBS, main
from train.arguments import parse_options
from train.compress.options import Compress
from train.options.export import Export
from train.options.finetune import Finetune
from train.options.fit import Fit, RunArguments, parse
from train.options.import_torch import Import

ON = ["--flip", "--flip True", "--flip=true", "--data.flip", "--data.flip True"]
OFF = ["--no-flip", "--flip False", "--data.no-flip", "--data.flip=False"]
BOTH = [*((words, True) for words in ON), *((words, False) for words in OFF)]


def read(kind, *words):
    given = {Compress: ["run", "--out", "o"], Export: ["run", "--out", "o"]}
    return parse_options(kind, [*given[kind], *words], verb="x")


@pytest.mark.parametrize(("words", "value"), BOTH)
def test_what_is_on_or_off_has_one_spelling_everywhere(words, value):
    compress = read(Compress, *words.split(), "--seed", "3")
    assert (compress.flip, compress.seed) == (value, 3)
    fit = parse([*words.split(), "--seed", "3"])
    assert (fit.run.data.flip, fit.run.seed) == (value, 3)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        *((verb, "CHECKPOINT") for verb in ("evaluate", "compress", "finetune")),
        ("export", "CHECKPOINT"),
        ("diff", "CHECKPOINT OTHER"),
        ("predict", "CHECKPOINT IMAGE [IMAGE ...]"),
        ("import", "WEIGHTS"),
        ("sweep", "FILE"),
        ("models", "[NAME]"),
    ],
)
def test_the_usage_names_what_comes_without_an_option(verb, words, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.endswith(f"train {verb} [-h] [OPTIONS] {words}")


@pytest.mark.parametrize("name", ["--model", "--model.name"])
def test_a_network_has_one_spelling_everywhere(name, capsys):
    assert parse([name, "lenet"]).run.model.name == "lenet"
    weights = ["w.pth", "--out", "o", "--mean", "0.5", "--std", "0.5"]
    assert parse_options(Import, [*weights, name, "lenet"], verb="x").model == "lenet"
    # The default name, too, is refused beside what makes another network.
    assert main(["fit", name, "resnet18", "--model.factory", "own:make"]) == 2
    assert "`model.name` (=resnet18) does nothing" in capsys.readouterr().err


def test_other_switches_are_spelt_alike():
    assert read(Compress).flip is None
    assert read(Compress, "--flip", "None", "--weigh", "False").weigh is False
    assert read(Compress, "--resized_crop", "--keep-stem").resized_crop is True
    assert read(Compress, "--data.resized-crop", "False").resized_crop is False
    assert read(Export, "--fold=false").fold is False
    run = parse(["--resized-crop", "true", "--optimizer.nesterov=True"]).run
    assert run.data.resized_crop
    assert run.optimizer.nesterov
    assert parse(["--name", "True"]).run.name == "True"


def test_the_word_after_a_switch_may_be_a_checkpoint():
    words = ["--flip", "run", "--resized-crop", "--out", "o", "--data", "digits"]
    args = parse_options(Compress, words, verb="x")
    assert (args.checkpoint, args.flip, args.resized_crop) == ("run", True, True)


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["--flip", "maybe"], "Unrecognized options: maybe"),
        (["--flip=maybe"], "Expected one of"),
        (["--weigh=maybe"], "Unrecognized options: maybe"),
    ],
)
def test_a_value_that_is_neither_shows_the_right_form(words, form, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(Compress, *words)
    said = " ".join(capsys.readouterr().err.split())
    assert form in said
    assert "maybe" in said


def test_an_option_of_any_depth_is_found():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        deep_one: Annotated[bool, tyro.conf.arg(name="deep")] = True

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        flat: Annotated[Inner, tyro.conf.arg(name="")] = Inner()

    found = parse_options(Outer, ["--inner.deep", "False", "--no-deep"], verb="x")
    assert not found.inner.deep_one
    assert not found.flat.deep_one


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "benchmark"])
def test_help_fits_a_page(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_finetune_has_the_options_of_devices(monkeypatch):
    for kind in (Fit, Finetune):
        names = {field.name for field in dataclasses.fields(kind)}
        assert {"devices", "deterministic"} <= names
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    args = dataclasses.replace(parse([]), deterministic=True)
    assert isinstance(args, RunArguments)
    args.set_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_deterministic_ops=true"
