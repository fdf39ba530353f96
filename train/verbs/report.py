"""`python -m train report`: draw a run's learning curve and write its record."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import parse_options
from train.errors import user_input
from train.run.outputs import write_json
from train.run.report import draw_curve, format_curve, make_record


@dataclasses.dataclass(frozen=True)
class Report:
    """Prints a run's learning curve, draws it and writes its record."""

    run: Annotated[str, tyro.conf.Positional]
    """Directory of the run."""
    out: str | None = None
    """Stem of the files OUT.json and OUT.png; None: RUN/report."""
    seconds_to: tuple[float, ...] = ()
    """Test accuracies in (0, 1], for each of which the seconds of training until then
    are reported."""


def run(argv: Sequence[str]) -> int:
    """Reports as the arguments say, and prints where the files are."""
    args = parse_options(Report, argv, verb="report")
    directory = pathlib.Path(args.run).expanduser()
    record = make_record(directory, seconds_to=args.seconds_to)
    out = pathlib.Path(args.out).expanduser() if args.out else directory / "report"
    json_file, png_file = (out.with_name(out.name + e) for e in (".json", ".png"))
    with user_input():
        out.parent.mkdir(parents=True, exist_ok=True)
    write_json(json_file, record)
    draw_curve(record, png_file)
    print(f"{format_curve(record)}\nrecord  {json_file}\ncurve   {png_file}")
    return 0
