"""`python -m train quickstart`: a network dense, in factors and inertial, compared."""

import pathlib
from collections.abc import Sequence

from train.command import shell_command
from train.experiments.study import run_study, tell
from train.experiments.study_config import Smaller, Study
from train.options.quickstart import parse
from train.result import add_result

# A part of the images that `compress` takes by default is enough for digits.
STUDY = Study(
    config="quickstart",
    smaller={
        "tucker2": Smaller(("--ranks", "budget:macs=0.5")),
        "inertial": Smaller(("--macs", "0.7")),
    },
    compress=("--calibration-images", "128", "--recalibration-images", "1024"),
    finetune=(
        *("--epochs", "5", "--batch-size", "64"),
        *("--optimizer.learning-rate", "0.02"),
    ),
)


def run(argv: Sequence[str]) -> int:
    """Runs the stages that have not ended yet, and prints a row for each network."""
    args = parse(argv)
    workdir = pathlib.Path(args.workdir).expanduser()
    result = run_study(STUDY, workdir)
    add_result(tell(result, workdir, ("quickstart", *argv)))
    if result.rows:
        print("\nto go on:")
        for words, command in next_commands(workdir):
            print(f"  # {words}\n  {shell_command(*command)}")
        print(
            "Layers as narrow as these need not be quicker for fewer MACs; "
            "docs/speed.md times wide\nones."
        )
    return result.exit_code


def next_commands(
    workdir: pathlib.Path,
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns three commands to go on with: what each does, and its words."""
    dense, tuned = str(workdir / "dense"), str(workdir / "tucker2_finetuned")
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
