"""`python -m train study`: a network dense, and made smaller in several ways."""

import pathlib
from collections.abc import Sequence

from train.config_file import load_from_file
from train.experiments.study import make_study_record, run_study, tell
from train.experiments.study_config import Study
from train.options.study import parse
from train.result import add_result
from train.run.outputs import check_output_file, write_json


def run(argv: Sequence[str]) -> int:
    """Runs the stages that have not ended yet, and prints a row for each network."""
    args = parse(argv)
    file = pathlib.Path(args.file)
    study = load_from_file(file, "study", Study)
    workdir = pathlib.Path(args.workdir or f"runs/{file.stem}").expanduser()
    check_output_file("record", args.record)
    result = run_study(study, workdir, data=args.data, only=args.only)
    add_result(tell(result, workdir, ("study", *argv), study.device))
    if result.rows:
        write_json(args.record, make_study_record(study, result.rows))
    return result.exit_code
