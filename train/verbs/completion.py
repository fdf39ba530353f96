"""`python -m train completion`: completion of verbs and options, for bash and zsh."""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import tyro

from train.benchmark import checkpoints
from train.command import INSTALLED
from train.compress.options import Compress
from train.config import FINETUNE, Config
from train.experiments.pipeline_config import Pipeline
from train.options.completion import Completion, parse
from train.options.diff import Diff
from train.options.evaluate import Evaluate
from train.options.export import Export
from train.options.finetune import Finetune
from train.options.fit import Fit
from train.options.import_torch import Import
from train.options.models import Models
from train.options.pipeline import Run
from train.options.plan import Plan
from train.options.predict import Predict
from train.options.quickstart import Quickstart
from train.options.report import Report
from train.options.study import RunStudy
from train.options.sweep import SweepArguments
from train.result import add_result
from train.verbs.benchmark import SUITES

Suite: Any = Literal[tuple(SUITES)]


@dataclasses.dataclass(frozen=True)
class Benchmark(checkpoints.Suite):
    """Checkpoints and their options, and the suites, whose options are their own."""

    suite: Suite = "checkpoints"


# The options of each verb, and their defaults where the class has none.
KINDS: Mapping[str, tuple[type, Any]] = {
    "fit": (Fit, Fit(Config())),
    "evaluate": (Evaluate, None),
    "compress": (Compress, None),
    "finetune": (Finetune, Finetune(FINETUNE)),
    "import": (Import, None),
    "export": (Export, None),
    "study": (RunStudy, None),
    "pipeline": (Run, Run(tyro.MISSING, Pipeline(run=Config()))),
    "sweep": (SweepArguments, None),
    "report": (Report, None),
    "models": (Models, None),
    "plan": (Plan, None),
    "diff": (Diff, None),
    "predict": (Predict, None),
    "benchmark": (Benchmark, None),
    "quickstart": (Quickstart, None),
    "completion": (Completion, None),
}


def run(argv: Sequence[str]) -> int:
    """Prints the script."""
    shell = parse(argv).shell
    script = make_script(shell)
    print(script)
    add_result({"shell": shell, "script": script})
    return 0


def make_script(shell: str) -> str:
    """Returns the script of a shell that completes the installed command."""
    verbs: Any = Union[  # noqa: UP007  # of a tuple
        tuple(
            Annotated[
                kind,
                tyro.conf.subcommand(
                    verb,
                    default=tyro.MISSING_NONPROP if default is None else default,
                    prefix_name=False,
                ),
            ]
            for verb, (kind, default) in KINDS.items()
        )
    ]
    words = ["--tyro-print-completion", shell]
    with (
        contextlib.redirect_stdout(io.StringIO()) as script,
        contextlib.suppress(SystemExit),
    ):
        tyro.cli(verbs, args=words, prog=INSTALLED)
    # A description of several lines would be taken for several answers.
    return "\n".join(
        line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC") else line
        for line in script.getvalue().splitlines()
    )
