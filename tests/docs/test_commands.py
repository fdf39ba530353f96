"""Every command on the pages of the documentation is one that the program takes."""

import re
import shlex

import jax
import pytest
import tyro
from conftest import ROOT
from pages import PAGES, name_of

import inertia_jax as ij
from train.__main__ import main
from train.verbs import finetune

PROGRAM = r"\bpython -m train (?=[a-z])"
# What stands for something of the reader's in a command.
MEANT = {
    "...": "configs/quickstart.py",
    "N": "4",
    "I": "0",
    "$JOB_COMPLETION_INDEX": "0",
}


def commands_of(page):
    """Yields the words of each command, from the verb on."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    # In an indented block, or one with a fence.
    for line in re.findall(rf"^ {{4}}.*{PROGRAM}.*|^{PROGRAM}.*", text, re.M):
        words = shlex.split(re.split(PROGRAM, line)[1], comments=True)
        yield [MEANT.get(word, word) for word in words]


COMMANDS = {
    f"{name_of(page)}: {shlex.join(words)}": words
    for page in PAGES
    for words in commands_of(page)
}


class ParsedError(BaseException):
    """The end of a command whose options were read."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "lenet"
    model = ij.create_model("lenet", width=0.0625)
    about = ij.Metadata(
        ij.Preprocessing((28, 28, 1), (0.1,), (0.3,)), tuple("0123456789")
    )
    variables = ij.init_variables(model, jax.random.key(0))
    ij.save_checkpoint(path, model, variables, metadata=about)
    return path


@pytest.fixture
def parsed_alone(monkeypatch, checkpoint):
    """Has a command end when its options were read."""
    cli = tyro.cli
    # Its defaults are those of the checkpoint.
    monkeypatch.setattr(finetune, "find_checkpoint", lambda path: checkpoint)

    def parse(*args, **kwargs):
        cli(*args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", parse)


def test_pages_have_commands_of_every_verb_that_makes_something():
    verbs = {words[0] for words in COMMANDS.values()}
    assert verbs >= {"fit", "evaluate", "compress", "finetune", "import", "export"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_understood(command, parsed_alone, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ParsedError):
        main(COMMANDS[command])
