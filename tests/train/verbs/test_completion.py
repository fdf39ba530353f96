"""Completion of verbs and options, by the script that bash reads."""

import shutil
import subprocess

import pytest

from train.__main__ import VERBS, main
from train.verbs.completion import KINDS, make_script

# What bash does when a tab is typed after the last of the words.
TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_tyro_inertia
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_every_verb_is_completed():
    assert set(KINDS) == set(VERBS)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_verbs_options_and_values_are_completed(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "inertia"
    script.write_text(capsys.readouterr().out)

    def tab(*words):
        command = ["bash", "-c", TAB, "bash", str(script), "inertia", *words]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(found.stdout.split())

    assert set(VERBS) <= tab("")
    assert tab("pred") == {"predict"}
    assert tab("fit", "--epo") == {"--epochs"}
    assert tab("fit", "--optimizer.schedule", "co") == {"cosine"}
    assert tab("compress", "run", "--finetune-ep") == {"--finetune-epochs"}
    assert tab("benchmark", "--suite", "inf") == {"infer"}
    assert tab("benchmark", "run", "--batch-s") == {"--batch-sizes"}


def test_zsh_has_a_script_of_its_own():
    script = make_script("zsh")
    assert script.startswith("#compdef inertia\n")
    assert all(f"'{verb}'" in script for verb in VERBS)
