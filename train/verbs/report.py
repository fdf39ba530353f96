"""`python -m train report`: a page, and a record, of runs and checkpoints."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from inertia_jax.atomic import appearing
from inertia_jax.chips.compiler import topology
from train.errors import UsageError, user_input
from train.machine.processes import first_devices, say
from train.options.report import Report, parse
from train.report.findings import Examiner, Findings
from train.report.page import render
from train.report.record import make_report_record
from train.report.speed import (
    BATCH_SIZES,
    estimate_cycles,
    kept_latency,
    measure_latency,
)
from train.report.subjects import read_subjects
from train.result import add_result
from train.run.outputs import check_output, write_json
from train.run.report import draw_curve, format_curve

# The suffixes of the files.
_KINDS = ("html", "md", "json", "png")


def run(argv: Sequence[str]) -> int:
    """Reports as the arguments say, and prints where the files are."""
    args = parse(argv)
    _check(args)
    subjects = read_subjects(
        args.paths, seconds_to=args.seconds_to, factory=args.factory
    )
    if args.seconds_to and not any(subject.record for subject in subjects):
        raise UsageError(
            f"`seconds_to` (={args.seconds_to}) does nothing without a run."
        )
    stem = _stem(args, is_run=subjects[0].record is not None)
    check_output("out", stem.parent)
    files = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in _KINDS}
    examiner = Examiner(
        args.settings,
        source=args.data,
        num_images=args.images,
    )
    findings = [examiner.examine(subject) for subject in subjects]
    latency = kept_latency(_record_before(files["json"]), subjects)
    if args.latency and latency is None:
        latency = measure_latency(subjects)
    findings = [_with_speed(args, found, latency) for found in findings]
    record = make_report_record(
        findings, latency=latency, device=args.device, cycles_batch=BATCH_SIZES[-1]
    )
    html, markdown = render(findings, record, page=files["html"].name)
    with user_input():
        stem.parent.mkdir(parents=True, exist_ok=True)
        for name, text in (("html", html), ("md", markdown)):
            with appearing(files[name]) as partial:
                partial.write_text(text, encoding="utf-8")
    write_json(files["json"], record)
    add_result({"files": files, **record})
    if len(subjects) == 1 and subjects[0].record is not None:
        alone = dict(subjects[0].record)
        draw_curve(alone, files["png"])
        print(f"{format_curve(alone)}\ncurve   {files['png']}")
    print(f"record  {files['json']}\ntables  {files['md']}\npage    {files['html']}")
    return 0


def _check(args: Report) -> None:
    """Raises UsageError where an option lies outside its range, before the work."""
    if not args.paths:
        raise UsageError("a run or a checkpoint must be given.")
    if args.images < 0:
        raise UsageError(f"`images` (={args.images}) must be >= 0.")
    first_devices(args.settings.devices)
    if args.device is not None:
        with user_input():
            topology(args.device)


def _stem(args: Report, *, is_run: bool) -> pathlib.Path:
    """Returns the path of the files, without the suffixes."""
    if args.out is None:
        is_alone = len(args.paths) == 1 and is_run
        folder = args.paths[0] if is_alone else "report"
        return pathlib.Path(folder).expanduser() / "report"
    out = pathlib.Path(args.out).expanduser()
    is_folder = args.out.endswith(("/", os.sep)) or out.is_dir()
    if is_folder:
        return out / "report"
    return out.with_suffix("") if out.suffix.removeprefix(".") in _KINDS else out


def _record_before(path: pathlib.Path) -> Any:
    """Returns the record that is to be replaced, None if there is none."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):  # it is written anew
        return None


def _with_speed(args: Report, found: Findings, latency: Any) -> Findings:
    """Returns the findings with the times and the cycles that are known."""
    subject, cycles = found.subject, None
    if subject.network is None:
        return found
    if args.device is not None:
        say(f"compiling {subject.name} for {args.device}")
        with user_input():
            cycles = estimate_cycles(
                subject.network, args.device, batch_size=BATCH_SIZES[-1]
            )
    times = latency["networks"][subject.sha256] if latency else {}
    return dataclasses.replace(found, latency=times, cycles=cycles)
