"""Studies: a dense network, smaller ones made from it, and their comparison."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import pathlib
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from inertia_jax.cost.table import aligned
from inertia_jax.metadata import load_metadata
from train.command import shell_command
from train.compress.accuracy import in_words
from train.config_file import load_config
from train.errors import UsageError, user_input
from train.evaluate.evaluation import in_points
from train.experiments.study_config import DENSE, Study
from train.fit.best import Best
from train.machine.processes import say
from train.networks import read_description
from train.result import apart
from train.run.checkpoints import (
    find_checkpoint,
    last_checkpoint,
    manifest_sha256,
)
from train.run.directory import describe_machine, read_json, write_whole
from train.run.outputs import check_output
from train.run.report import make_record

CONTROL = "control"

_TRAINING = ("fit", "finetune")
# Whose records have the hashes of the checkpoints that they are about.
_RECORDS = ("report", "benchmark")
# Whose files take minutes at most, and are made again where the command is another.
_QUICK = ("export", *_RECORDS)
# What a damaged record leads to.
_OF_ANOTHER_FORM = (AttributeError, KeyError, TypeError, ValueError)
# Calls of one image take so little time that other threads may double it.
_REPEATS = "61"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command of this program, and what it leaves.

    Attributes:
        what: What it does, in words.
        command: Its words, from the verb on.
        out: The run, the checkpoint or the file that it leaves.
        runs: The runs that it is about, if it trains none.
    """

    what: str
    command: tuple[str, ...]
    out: pathlib.Path
    runs: tuple[pathlib.Path, ...] = ()

    @property
    def verb(self) -> str:
        """The verb of the command."""
        return self.command[0]

    def is_complete(self) -> bool:
        """Returns whether the command has ended; files must be of the runs as now."""
        if self.verb in _TRAINING:
            return _is_trained(self.out)
        if self.verb in _RECORDS:
            return self.out.is_file() and _is_of(self.out, self.runs)
        if self.verb == "export":
            return self.out.exists() and _is_newer(self.out, self.runs[0])
        return self.out.exists()  # a checkpoint appears whole or not at all


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """How far a study has come.

    Attributes:
        stopped_in: The stage in which it was stopped; None: it has ended.
        exit_code: The exit code of that stage.
        stopped_by: The signal that stopped it, if that is what did.
        rows: The networks, if all stages have ended.
    """

    stopped_in: Stage | None = None
    exit_code: int = 0
    stopped_by: int | None = None
    rows: tuple[Mapping[str, Any], ...] = ()


def run_study(
    study: Study,
    workdir: pathlib.Path,
    *,
    data: str | None = None,
    only: Collection[str] = (),
) -> StudyResult:
    """Runs the stages that have not ended yet, each of which prints its command.

    Args:
        study: The study.
        workdir: The directory of all runs, checkpoints and files.
        data: The data, as `make_stages` takes them.
        only: The smaller networks to make, as `make_stages` takes them.

    Raises:
        UsageError: The input is bad, or that of a stage is.
    """
    check_output("workdir", workdir)
    stages = make_stages(study, workdir, data=data, only=only)
    file = workdir / "commands.json"
    made = _read_commands(file)
    commands = {stage.out.name: _without_place(stage, workdir) for stage in stages}
    # What lies there without a command is the user's own, and is taken as it is.
    others = {name for name, now in commands.items() if made.get(name, now) != now}
    for stage in stages:
        name = stage.out.name
        if name in others and stage.verb not in _QUICK and stage.out.exists():
            raise UsageError(
                f"{stage.out} was made by another command than this study's; nothing "
                f"was changed. Give another --workdir. The commands, in {workdir}:\n"
                f"{shlex.join(made[name])}\n{shlex.join(commands[name])}"
            )
    for number, stage in enumerate(stages, start=1):
        heading = f"[{number}/{len(stages)}] {stage.what}"
        if stage.out.name not in others and stage.is_complete():
            say(f"{heading}: done before, {stage.out}")
            continue
        say(f"\n{heading}\n{shell_command(*stage.command)}")
        made[stage.out.name] = commands[stage.out.name]
        if stage.verb not in _QUICK:  # what it has begun is already its own
            _write_commands(file, made)
        code, result = _run(stage)
        if not stage.is_complete():
            stopped_by = result.get("stopped_by")
            if code == 0 and stopped_by is None:
                raise UsageError(
                    f"{stage.what!r} has ended, and {stage.out} is not whole."
                )
            return StudyResult(stage, code, stopped_by)
        _write_commands(file, made)
    try:
        return StudyResult(rows=tuple(_rows(stages)))
    except _OF_ANOTHER_FORM as error:
        files = ", ".join(str(s.out) for s in stages if s.verb in _RECORDS)
        raise UsageError(
            f"a record of the study is damaged ({type(error).__name__}: {error}); the "
            f"same command writes them again once these are removed: {files}."
        ) from error


def _read_commands(file: pathlib.Path) -> dict[str, list[str]]:
    """Reads the words of the commands that have made what lies in a directory."""
    made = read_json(file) if file.is_file() else {}
    is_known = isinstance(made, dict) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words)
        for words in made.values()
    )
    if not is_known:
        raise UsageError(
            f"{file} holds no commands of a study; nothing was changed. Once it is "
            f"removed, what lies beside it is taken to be of this study."
        )
    return made


def _write_commands(file: pathlib.Path, made: Mapping[str, Sequence[str]]) -> None:
    with user_input():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(made, indent=1) + "\n")


def make_stages(
    study: Study,
    workdir: pathlib.Path,
    *,
    data: str | None = None,
    only: Collection[str] = (),
) -> list[Stage]:
    """Returns the stages, of which each is one command.

    Args:
        study: The study.
        workdir: The directory of all runs, checkpoints and files.
        data: The data; None: those of the configuration, or those that the checkpoint
            was trained on.
        only: Names of the smaller networks to make; empty: all of them.

    Raises:
        UsageError: A name of `only` is none of the study's, or lacks the one that it
            is made from; there is no checkpoint, it does not say what it was trained
            on and nothing else does, or a stage would write to its place; or two stages
            would write to one place.
    """
    chosen = study.choose(only)
    stages = []
    source: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    if study.config:
        runs = {DENSE: workdir / DENSE}
        told = () if data is None else ("--data.source", data)
        command = ("fit", "--config", study.config, "--name", DENSE, *told)
        command += _in(runs[DENSE])
        stages.append(Stage("training the network, dense", command, runs[DENSE]))
        data = data or load_config(study.config).data.source
    else:
        # A run may have a better checkpoint later.
        runs = {DENSE: find_checkpoint(str(study.checkpoint))}
        data = _told_source(runs[DENSE], data, study)
        # The other checkpoints say it of themselves, this one perhaps not.
        source, images = ("--data.source", data), ("--data", data)
    teacher = ("--teacher", str(runs[DENSE])) if study.teacher else ()

    def finetune(name: str, start: pathlib.Path, run: pathlib.Path) -> Stage:
        command = ("finetune", str(start), "--name", name, *source)
        command += (*study.finetune, *teacher)
        what = f"fine-tuning the network of {start}"
        return Stage(what, (*command, *_in(run)), run)

    for name, smaller in chosen.items():
        out, runs[name] = workdir / name, workdir / f"{name}_finetuned"
        start = runs[smaller.start]
        command = ("compress", str(start), *images, *smaller.compress)
        command += study.compress
        what = f"compressing the network of {start}"
        stages.append(Stage(what, (*command, "--out", str(out)), out))
        stages.append(finetune(name, out, runs[name]))
    if study.control:
        runs[CONTROL] = workdir / CONTROL
        stages.append(finetune(CONTROL, runs[DENSE], runs[CONTROL]))
    for name, run in runs.items() if study.export is not None else ():
        file = workdir / f"{name}.ijx"
        command = ("export", str(run), *(study.export or ()), "--out", str(file))
        stages.append(Stage(f"writing {file}", command, file, (run,)))
    everything = tuple(runs.values())
    words = tuple(map(str, everything))
    if study.against:
        file = workdir / "benchmark.json"
        command = ("benchmark", *words, "--against", *study.against)
        command += ("--data", data, "--repeats", _REPEATS, "--out", str(file))
        stages.append(Stage("timing them in each program", command, file, everything))
    device = () if study.device is None else ("--device", study.device)
    command = ("report", *words, "--latency", *device, *images)
    command += ("--out", str(workdir / "report"))
    file = workdir / "report.json"
    what = "timing the networks, writing a page"
    stages.append(Stage(what, command, file, everything))
    _check_places(study.checkpoint, stages)
    return stages


def _told_source(checkpoint: pathlib.Path, data: str | None, study: Study) -> str:
    """Returns the data of a study of a checkpoint.

    Raises:
        UsageError: Neither the checkpoint nor the study says what its network was
            trained on, or how these images were augmented, for the control.
    """
    with user_input():
        network = read_description(checkpoint)
    source = data or network.source
    if source is None:
        raise UsageError(
            f"{checkpoint} does not say what its network was trained on: give --data."
        )
    options = [f"--data.{n.replace('_', '-')}" for n in network.unknown_augmentation]
    if study.control and not {*options} <= {*study.finetune}:
        raise UsageError(
            f"{checkpoint} does not say how images were augmented, which the control "
            f"needs to know: give {' and '.join(options)} in `finetune`."
        )
    return source


def _check_places(checkpoint: str | None, stages: Sequence[Stage]) -> None:
    """Raises UsageError where a stage would write to another's place."""
    places = [stage.out for stage in stages]
    if checkpoint is not None:
        places.append(pathlib.Path(checkpoint).expanduser())
    seen = set()
    for place in map(pathlib.Path.absolute, places):
        if place in seen:
            raise UsageError(
                f"{place} would be written twice; rename one of `smaller`, or give "
                f"another --workdir."
            )
        seen.add(place)


def _in(run: pathlib.Path) -> tuple[str, ...]:
    return ("--workdir", str(run), "--resume")


def _without_place(stage: Stage, workdir: pathlib.Path) -> list[str]:
    """Returns a stage's words, of which those for paths in `workdir` lack it."""
    place = f"{workdir}/"
    return [word.removeprefix(place) for word in stage.command]


def _run(stage: Stage) -> tuple[int, Mapping[str, Any]]:
    """Runs a stage, and returns its exit code and its result.

    Of what is not trained only the accuracy is printed: the page has the rest, too.
    """
    verb = importlib.import_module(f"train.verbs.{stage.verb}")
    shown = (
        contextlib.nullcontext()
        if stage.verb in _TRAINING
        else contextlib.redirect_stdout(io.StringIO())
    )
    with apart() as result, shown:
        code: int = verb.run(stage.command[1:])
    for test in result.get("tests", ()):
        print(in_words(test))
    return code, result


def _is_trained(run: pathlib.Path) -> bool:
    """Returns whether a run has ended, early or not, and its checkpoint is there."""
    try:
        record = make_record(run)
        last = record["curve"][-1]
        saved = last_checkpoint(run)
    except (UsageError, IndexError):  # it was not begun, or not for an epoch
        return False
    if saved.name != f"step_{last['step']:08d}":
        return False
    epoch, config = last["epoch"], record["config"]
    patience = config.get("early_stopping")
    if epoch == config["epochs"]:
        return True
    if patience is None:
        return False
    try:
        return Best.of(load_metadata(saved).info).is_over(epoch, patience)
    except (OSError, ValueError, *_OF_ANOTHER_FORM):  # the training says what is wrong
        return False


def _is_newer(file: pathlib.Path, run: pathlib.Path) -> bool:
    manifest = find_checkpoint(run) / "manifest.json"
    return file.stat().st_mtime_ns > manifest.stat().st_mtime_ns


def _is_of(file: pathlib.Path, runs: Sequence[pathlib.Path]) -> bool:
    """Returns whether a record has the times of the checkpoints that runs have now."""
    hashes = [manifest_sha256(find_checkpoint(run)) for run in runs]
    try:
        record = read_json(file)
        timed = [s["sha256"] for s in record.get("subjects", ()) if s["latency_ms"]]
        timed += [row["sha256"] for row in record.get("rows", ())]
        return hashes == list(dict.fromkeys(timed))
    except (UsageError, *_OF_ANOTHER_FORM):  # it is damaged, and written again
        return False


def _rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Returns what the files of the last stages say of each network."""
    report = read_json(stages[-1].out)
    files = {s.runs[0]: s.out for s in stages if s.verb == "export"}
    untuned = {s.out.name: _untuned(s.out) for s in stages if s.verb == "compress"}
    timed = [read_json(s.out)["rows"] for s in stages if s.verb == "benchmark"]
    rows: list[dict[str, Any]] = []
    for subject, run in zip(report["subjects"], stages[-1].runs, strict=True):
        cost, evaluation = subject["cost"], subject["evaluation"]
        times_ms: dict[str, dict[str, float]] = {"jax": {}}
        for batch_size, spread in subject["latency_ms"].items():
            times_ms["jax"][batch_size] = spread["median_ms"]
        for row in timed[0] if timed else ():  # on real images, which open other gates
            if row["sha256"] == subject["sha256"] and "refused" not in row:
                times = times_ms.setdefault(row["program"], {})
                times[str(row["batch_size"])] = row["median_ms"]
        name = run.name.removesuffix("_finetuned") if rows else DENSE
        rows.append(
            {
                "network": name,
                "checkpoint": subject["checkpoint"],
                "form": subject["form"],
                "top1": subject["top1"],
                "difference": subject["difference"],
                "margin_95": subject["margin_95"],
                "untuned": untuned.get(name),
                "num_examples": evaluation["num_examples"],
                "params": cost["params"],
                "macs": cost["total_macs"],
                "share_of_dense": cost["total_macs"] / cost["dense_macs"],
                "times_ms": times_ms,
                "file_bytes": files[run].stat().st_size if files else None,
                "cycles": subject["cycles"],
            }
        )
    return rows


def _untuned(checkpoint: pathlib.Path) -> dict[str, float] | None:
    """Returns the accuracy of a compressed network before fine-tuning, by stage."""
    tests = load_metadata(checkpoint).info.get("compression_results", {}).get("tests")
    stages = tests[0]["stages"] if tests else {}
    return {name: result["top1"] for name, result in stages.items()} or None


def make_study_record(
    study: Study, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the record of a study as a JSON value."""
    return {
        "machine": describe_machine(),
        "study": json.loads(json.dumps(dataclasses.asdict(study))),
        "networks": list(rows),
    }


def format_networks(
    rows: Sequence[Mapping[str, Any]], device: str | None = None
) -> str:
    """Returns the table of networks, and what it holds."""
    first = rows[0]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "network": lambda row: row["network"],
        "untuned": lambda row: _last_share(row["untuned"] or {}),
        "top-1": lambda row: f"{row['top1']:.2%}",
        "to the first": lambda row: (
            ""
            if row is first or row["difference"] is None
            else in_points(row["difference"], row["margin_95"])
        ),
        "MACs": lambda row: f"{row['macs']:,}",
        "of dense": lambda row: f"{row['share_of_dense']:.0%}",
        "parameters": lambda row: f"{row['params']:,}",
    }
    for program in dict.fromkeys(name for row in rows for name in row["times_ms"]):
        for size in first["times_ms"]["jax"]:
            columns[f"{program}, {size}"] = functools.partial(_time, program, size)
    if first["file_bytes"]:
        columns["file"] = lambda row: f"{row['file_bytes'] / 1e6:.2f} MB"
    if first["cycles"]:
        columns[f"cycles, {device}"] = lambda row: f"{row['cycles']:,}"
    table = [[*columns], *([of(row) for of in columns.values()] for row in rows)]
    num_images = first["num_examples"]
    return (
        f"{aligned(table)}\n\n"
        f"top-1: of {num_images:,} test images, of which one is "
        f"{100 / num_images:.2f} points; they also\nchose the best epoch of each run. "
        f"untuned: before fine-tuning. to the first: the\ndifference in points on the "
        f"same images, and half of its 95% interval. MACs: an image,\nfriction and "
        f"gate rates counted. jax, 1: a call of one image in JAX, measured here in\n"
        f"turn, BatchNorm folded."
        + ("\nfile: what `export` writes for JAX alone." if first["file_bytes"] else "")
        + (
            f"\ncycles: estimated by the compiler of {device}, not measured, in "
            f"bfloat16."
            if first["cycles"]
            else ""
        )
    )


def _last_share(by_stage: Mapping[str, float]) -> str:
    return "".join(f"{share:.2%}" for share in [*by_stage.values()][-1:])


def _time(program: str, size: str, row: Mapping[str, Any]) -> str:
    time_ms = row["times_ms"].get(program, {}).get(size)
    return "" if time_ms is None else f"{time_ms:.3g} ms"


def tell(
    result: StudyResult,
    workdir: pathlib.Path,
    again: Sequence[str],
    device: str | None = None,
) -> dict[str, Any]:
    """Prints the table of networks, or what goes on, and returns the verb's result.

    Args:
        result: How far the study has come.
        workdir: Its directory.
        again: The words of the same command.
        device: The chip whose cycles were estimated.
    """
    if result.stopped_in is not None:
        command = shell_command(*again)
        what = result.stopped_in.what
        print(f"stopped in {what!r}; this goes on with it:\n{command}")
        stopped_by = result.stopped_by
        return {"workdir": workdir, "stopped_by": stopped_by, "networks": None}
    page = workdir / "report.html"
    print(f"\n{format_networks(result.rows, device)}\n\npage  {page}")
    return {
        "workdir": workdir,
        "stopped_by": None,
        "networks": result.rows,
        "num_examples": result.rows[0]["num_examples"],
        "page": page,
    }
