"""`python -m train quickstart`: a network dense, in factors and inertial, compared."""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from inertia_jax.cost.table import aligned
from train.command import shell_command
from train.compress.accuracy import in_words
from train.errors import UsageError
from train.machine.processes import say
from train.options.quickstart import parse
from train.result import add_result, apart
from train.run.checkpoints import find_checkpoint, last_checkpoint
from train.run.directory import read_json
from train.run.outputs import check_output
from train.run.report import make_record

# The configuration of the dense network, and the shares of its MACs that others keep.
_CONFIG = "quickstart"
_TUCKER2_MACS = "0.5"
_INERTIAL_MACS = "0.7"
# A part of the images that `compress` takes by default is enough for digits.
_IMAGES = ("--calibration-images", "128", "--recalibration-images", "1024")
_TUNING = (
    *("--epochs", "5", "--batch-size", "64"),
    *("--optimizer.learning-rate", "0.02"),
)
# Networks of the table: the name, and the run that has it, in the working directory.
_NETWORKS = {
    "dense": "dense",
    "tucker2": "tucker2_finetuned",
    "inertial": "inertial_finetuned",
}
# The report times calls of so many images.
_BATCH = "64"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command of this program, and what it leaves.

    Attributes:
        what: What it does, in words.
        command: Its words, from the verb on.
        out: The run, the checkpoint or the record that it leaves.
    """

    what: str
    command: tuple[str, ...]
    out: pathlib.Path

    @property
    def verb(self) -> str:
        """The verb of the command."""
        return self.command[0]

    def is_complete(self, runs: Sequence[pathlib.Path]) -> bool:
        """Returns whether the command has ended; the record must be of `runs`."""
        if self.verb == "compress":  # a checkpoint appears whole or not at all
            return self.out.exists()
        if self.verb == "report":
            return self.out.is_file() and _is_of(read_json(self.out), runs)
        return _is_trained(self.out)


def run(argv: Sequence[str]) -> int:
    """Runs the stages that have not ended yet, and prints a row for each network."""
    args = parse(argv)
    workdir = pathlib.Path(args.workdir).expanduser()
    check_output("workdir", workdir)
    runs = [workdir / name for name in _NETWORKS.values()]
    stages = make_stages(workdir)
    for number, stage in enumerate(stages, start=1):
        heading = f"[{number}/{len(stages)}] {stage.what}"
        if stage.is_complete(runs):
            say(f"{heading}: done before, {stage.out}")
            continue
        say(f"\n{heading}\n{shell_command(*stage.command)}")
        code, result = _run(stage)
        if not stage.is_complete(runs):
            again = shell_command("quickstart", *argv)
            print(f"stopped in {stage.what!r}; this goes on with it:\n{again}")
            stopped_by = result.get("stopped_by")
            add_result({"workdir": workdir, "stopped_by": stopped_by, "networks": None})
            return code
    _finish(workdir, read_json(stages[-1].out))
    return 0


def make_stages(workdir: pathlib.Path) -> list[Stage]:
    """Returns the stages, of which each is one command."""
    dense = workdir / "dense"
    fit = ("fit", "--config", _CONFIG, "--name", "dense")
    stages = [Stage("training the network, dense", (*fit, *_in(dense)), dense)]
    for name, what, share in (
        ("tucker2", "factorising", ("--ranks", f"budget:macs={_TUCKER2_MACS}")),
        ("inertial", "making inertial", ("--macs", _INERTIAL_MACS)),
    ):
        out, tuned = workdir / name, workdir / _NETWORKS[name]
        command = ("compress", str(dense), *share, *_IMAGES, "--out", str(out))
        stages.append(Stage(f"{what} the dense network", command, out))
        finetune = ("finetune", str(out), "--name", name, *_TUNING, *_in(tuned))
        stages.append(Stage(f"fine-tuning the network of {out}", finetune, tuned))
    runs = [str(workdir / name) for name in _NETWORKS.values()]
    report = ("report", *runs, "--latency", "--out", str(workdir / "report"))
    out = workdir / "report.json"
    return [*stages, Stage("timing the networks, writing a page", report, out)]


def _in(run: pathlib.Path) -> tuple[str, ...]:
    return ("--workdir", str(run), "--resume")


def _run(stage: Stage) -> tuple[int, Mapping[str, Any]]:
    """Runs a stage, and returns its exit code and its result.

    What `compress` and `report` print is left out: the page has it, too.
    """
    verb = importlib.import_module(f"train.verbs.{stage.verb}")
    is_training = stage.verb in ("fit", "finetune")
    shown = (
        contextlib.nullcontext()
        if is_training
        else contextlib.redirect_stdout(io.StringIO())
    )
    with apart() as result, shown:
        code: int = verb.run(stage.command[1:])
    for test in result.get("tests", ()):
        print(in_words(test))
    return code, result


def _is_trained(run: pathlib.Path) -> bool:
    """Returns whether a run's last epoch has ended, and its checkpoint is there."""
    try:
        record = make_record(run)
        last = record["curve"][-1]
        saved = last_checkpoint(run).name
    except (UsageError, IndexError):  # it was not begun, or not for an epoch
        return False
    is_last = last["epoch"] == record["config"]["epochs"]
    return is_last and saved == f"step_{last['step']:08d}"


def _is_of(record: Mapping[str, Any], runs: Sequence[pathlib.Path]) -> bool:
    """Returns whether a report has the times of the checkpoints that runs have now."""
    manifests = [find_checkpoint(run) / "manifest.json" for run in runs]
    hashes = [hashlib.sha256(m.read_bytes()).hexdigest() for m in manifests]
    timed = [s["sha256"] for s in record["subjects"] if s["latency_ms"]]
    return hashes == timed


def _finish(workdir: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Prints the table of networks, and what to do next."""
    rows = [
        {
            "network": subject["name"],
            "top1": subject["top1"],
            "macs": subject["cost"]["total_macs"],
            "share_of_dense": subject["cost"]["total_macs"]
            / subject["cost"]["dense_macs"],
            "params": subject["cost"]["params"],
            "latency_ms": subject["latency_ms"][_BATCH]["median_ms"],
            "checkpoint": subject["checkpoint"],
        }
        for subject in record["subjects"]
    ]
    num_images = record["subjects"][0]["evaluation"]["num_examples"]
    page = workdir / "report.html"
    print(f"\n{format_networks(rows, num_images)}\n")
    print(f"page  {page}\n\nto go on:")
    for words, command in next_commands(workdir):
        print(f"  # {words}\n  {shell_command(*command)}")
    add_result(
        {
            "workdir": workdir,
            "stopped_by": None,
            "networks": rows,
            "num_examples": num_images,
            "page": page,
        }
    )


def format_networks(rows: Sequence[Mapping[str, Any]], num_images: int) -> str:
    """Returns the table of networks, and what it holds."""
    heads = ["network", "top-1", "MACs", "of dense", "parameters", f"ms, {_BATCH}"]
    table = aligned(
        [
            heads,
            *(
                [
                    row["network"],
                    f"{row['top1']:.2%}",
                    f"{row['macs']:,}",
                    f"{row['share_of_dense']:.0%}",
                    f"{row['params']:,}",
                    f"{row['latency_ms']:.3g}",
                ]
                for row in rows
            ),
        ]
    )
    return (
        f"{table}\n\n"
        f"top-1: of {num_images:,} test images, of which one is "
        f"{100 / num_images:.2f} points; they also\nchose the best epoch of each run. "
        f"MACs: an image, friction and gate rates counted.\nms: a call of {_BATCH} "
        f"images, measured here in turn, BatchNorm folded. Layers as narrow as\n"
        f"these need not be quicker for fewer MACs; docs/speed.md times wide ones."
    )


def next_commands(
    workdir: pathlib.Path,
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns three commands to go on with: what each does, and its words."""
    dense, tuned = str(workdir / "dense"), str(workdir / _NETWORKS["tucker2"])
    quarter = ("--ranks", "budget:macs=0.25", "--finetune-epochs", "3")
    images = ("--data", "imagefolder:FOLDER", "--data.image-size", "64")
    return (
        (
            "a quarter of the MACs, fine-tuned with the dense network as teacher",
            ("compress", dense, *quarter, "--out", "checkpoints/quarter"),
        ),
        (
            "a file that needs JAX alone; quickstart.onnx is for ONNX Runtime",
            ("export", tuned, "--out", "quickstart.ijx"),
        ),
        (
            "a network for your own images, FOLDER/train/CLASS/*.png",
            ("fit", *images, "--model.name", "resnet20", "--name", "own"),
        ),
    )
