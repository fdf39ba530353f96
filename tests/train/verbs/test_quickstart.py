"""The quick start: a study of digits, and what it prints to go on with."""

from train.arguments import parse_options
from train.experiments.study import make_stages
from train.verbs.completion import KINDS
from train.verbs.quickstart import STUDY, next_commands


def test_every_command_that_it_prints_is_understood(tmp_path):
    commands = [stage.command for stage in make_stages(STUDY, tmp_path)]
    assert [command[0] for command in commands] == [
        *("fit", "compress", "finetune", "compress", "finetune", "report")
    ]
    going_on = [command for _, command in next_commands(tmp_path)]
    assert len(going_on) == 3
    made = [*tmp_path.parts, "tucker2_finetuned"]
    assert (
        going_on[1][1].split("/")[-1]
        == made[-1]
        in {stage.out.name for stage in make_stages(STUDY, tmp_path)}
    )
    for verb, *words in [*commands, *going_on]:
        kind, default = KINDS[verb]
        parse_options(kind, words, verb=verb, default=default)
