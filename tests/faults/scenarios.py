"""Commands of each verb on a tiny network, and what they leave."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

_IMAGES = ("--data.mean", "0.5", "--data.std", "0.25", "--data.crop-padding", "1")
_NETWORK = ("--model.name", "lenet", "--model.width", "0.1")
_TRAINING = ("--batch-size", "16", "--log-steps", "2")
_SAVING = ("--checkpoint-steps", "2", "--resume")
_SHORT = ("--calibration-images", "16", "--recalibration-images", "16")
_SET = ("--data.source", "npz:set.npz")

_CONFIG = """
from train.config import Config, Data, Model, Optimizer
config = Config(
    name="small", epochs=2, batch_size=16, log_steps=2, checkpoint_steps=2,
    data=Data(source="npz:set.npz", mean=(0.5,), std=(0.25,), crop_padding=1),
    model=Model(name="lenet", width=0.1),
    optimizer=Optimizer(learning_rate=0.05, milestones=(1,)),
)
"""
_SWEEP = f"""{_CONFIG}
import dataclasses
from train.experiments.sweep import Sweep
other = dataclasses.replace(config, name="other", optimizer=Optimizer("adadelta"))
sweep = Sweep((config, other), seeds=(1,))
"""
_PIPELINE = f"""{_CONFIG}
from train.experiments.pipeline_config import Pipeline
pipeline = Pipeline(config, head="fc2", head_epochs=1, ranks=("ratio:0.5",))
"""
_STUDY = """
from train.experiments.study_config import Smaller, Study
study = Study(
    config="config.py",
    smaller={"tucker2": Smaller(("--ranks", "ratio:0.5"))},
    compress=("--calibration-images", "16", "--recalibration-images", "16"),
    finetune=("--epochs", "1", "--batch-size", "16"),
    export=(),
)
"""
_FILES = {
    "config.py": _CONFIG,
    "sweep.py": _SWEEP,
    "pipeline.py": _PIPELINE,
    "study.py": _STUDY,
}

# What every folder has before a command, and commands do not change.
GIVEN = {*_FILES, "set.npz", "weights.safetensors", "dense", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command.

    Attributes:
        words: The verb and its options.
        reads: What it reads and another command has made.
    """

    words: tuple[str, ...]
    reads: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """The verb."""
        return self.words[0]


def _compress(out: str, *options: str) -> tuple[str, ...]:
    return ("compress", "dense", "--out", out, *options, *_SHORT)


_TUNED = ("--finetune-epochs", "2", "--finetune-batch-size", "16", "--resume")

SCENARIOS = {
    "fit": Scenario(
        (
            *("fit", *_SET, *_IMAGES, *_NETWORK, *_TRAINING, *_SAVING),
            *("--epochs", "4", "--workdir", "run"),
        ),
    ),
    "finetune": Scenario(
        (
            *("finetune", "dense", *_TRAINING, *_SAVING, "--epochs", "2"),
            *("--teacher", "dense", "--workdir", "tuned"),
        ),
        reads=("dense",),
    ),
    "compress": Scenario(
        _compress("small", "--ranks", "ratio:0.5", "--record", "small.json", *_TUNED),
        reads=("dense",),
    ),
    "inertial": Scenario(_compress("gated", "--macs", "0.97"), reads=("dense",)),
    "evaluate": Scenario(
        ("evaluate", "dense", "--out", "evaluation.json"), reads=("dense",)
    ),
    "export": Scenario(("export", "dense", "--out", "net.ijx"), reads=("dense",)),
    "import": Scenario(
        (
            *("import", "weights.safetensors", "--model", "lenet", "--width", "0.1"),
            *("--image-size", "10", "--num-classes", "10", "--mean", "0.5"),
            *("--std", "0.25", "--out", "imported"),
        ),
        reads=("weights.safetensors",),
    ),
    "report": Scenario(
        ("report", "dense", "--images", "1", "--out", "page"), reads=("dense",)
    ),
    "sweep": Scenario(
        ("sweep", "sweep.py", "--out", "records.jsonl", "--workdir", "runs"),
    ),
    "pipeline": Scenario(
        (
            *("pipeline", "pipeline.py", "--weights", "weights.safetensors"),
            *("--workdir", "stages", "--record", "stages.json"),
        ),
        reads=("weights.safetensors",),
    ),
    "study": Scenario(("study", "study.py", "--workdir", "study")),
    # Of the small study: the shipped one takes minutes.
    "quickstart": Scenario(("quickstart", "--workdir", "quick")),
}


def make_given(folder: pathlib.Path) -> None:
    """Makes images, weights and configurations."""
    from safetensors.numpy import save_file

    import inertia_jax as ij

    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 48), ("test", 16)):
        labels = np.arange(count) % 10
        images = rng.integers(40, size=(count, 10, 10, 1))
        images += 20 * labels[:, None, None, None]
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    np.savez(folder / "set.npz", **arrays)
    for name, text in _FILES.items():
        (folder / name).write_text(text)

    import jax

    model = ij.create_model("lenet", num_classes=10, width=0.1)
    variables = ij.init_variables(model, jax.random.key(5), (10, 10, 1))
    save_file(ij.to_torch(model, variables), folder / "weights.safetensors")


def shorten_quickstart() -> None:
    """Has the verb `quickstart` run the small study."""
    import train.verbs.quickstart as quickstart
    from train.config_file import load_from_file
    from train.experiments.study_config import Study

    quickstart.STUDY = load_from_file(pathlib.Path("study.py"), "study", Study)


def new_folder(given: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes a folder in which a command can be run, in the place of another."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(given, folder, symlinks=True)


def files_made(folder: pathlib.Path, scenario: Scenario) -> list[str]:
    """Returns the files that the command reads or has left, as paths in the folder."""
    places = [
        p for p in folder.iterdir() if p.name not in GIVEN or p.name in scenario.reads
    ]
    files = [f for p in places for f in ([p] if p.is_file() else p.rglob("*"))]
    names = (f.relative_to(folder).as_posix() for f in files if f.is_file())
    return sorted(name for name in names if "tensorboard" not in name)


def checkpoints_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all that stands where a complete checkpoint does."""
    return [
        arrays.parent
        for arrays in sorted(folder.rglob("arrays"))
        if not any(
            name.startswith((".", "damaged_"))
            for name in arrays.relative_to(folder).parts
        )
    ]


def outcome(folder: str) -> dict[str, Any]:
    """Returns what a command has left, without times, in which no two are equal.

    It has all arrays of each run's last and best checkpoint, and of each other one, the
    lines of metrics, the accuracies, losses and costs of the records, and the logits of
    the exported networks.
    """
    return dict(_parts(pathlib.Path(folder)))


def _parts(folder: pathlib.Path) -> Iterator[tuple[str, Any]]:
    from inertia_jax import load_exported
    from inertia_jax.metadata import best_step, checkpoint_path, latest_steps

    for place in sorted(folder.rglob("*")):
        name = place.relative_to(folder).as_posix()
        parts = name.split("/")
        if parts[0] in GIVEN or any(p.startswith((".", "damaged_")) for p in parts):
            continue
        if place.name == "checkpoints":
            steps = latest_steps(place)
            kept = {"last": steps[-1] if steps else None, "best": best_step(place)}
            for which, step in kept.items():
                if step is not None:
                    found = checkpoint_path(place, step)
                    yield f"{name}, {which}", [step, _hash_arrays(found)]
        elif place.name == "arrays" and "checkpoints" not in parts:
            yield name, _hash_arrays(place.parent)
        elif place.name == "metrics.jsonl":
            yield name, _metrics(place.read_text(errors="replace"))
        elif place.suffix in (".json", ".jsonl") and "arrays" not in parts:
            if place.name not in _DESCRIPTIONS:
                lines = place.read_text().splitlines()
                text = lines if place.suffix == ".jsonl" else ["".join(lines)]
                yield name, [_numbers(json.loads(part)) for part in text]
        elif place.suffix == ".ijx":
            images = np.arange(200, dtype=np.uint8).reshape(2, 10, 10, 1)
            logits = np.asarray(load_exported(place)(images))
            yield name, hashlib.sha256(logits.tobytes()).hexdigest()
        elif place.suffix in (".html", ".md", ".png"):
            yield name, [place.stat().st_size > 0]


# Stands in an outcome for what is not as it was written.
DAMAGED = "damaged"
_TIMES = {"time", "images_per_s", "train_seconds"}
# Files of JSON that have paths and times, and no results.
_DESCRIPTIONS = {
    *("config.json", "run.jsonl", "metadata.json", "manifest.json"),
    *("commands.json", "pipeline.json"),
}
_OTHERS = {"latency", "latency_ms", "origins", "starts", "started", "machine", "config"}
_RESULTS = {"step", "epoch", "top1", "top5", "loss", "params", "total_macs", "macs"}


def _metrics(text: str) -> Any:
    try:
        rows = [json.loads(line) for line in text.splitlines()]
        return [{k: row[k] for k in row if k not in _TIMES} for row in rows]
    except (TypeError, ValueError):
        return DAMAGED


def _numbers(value: Any) -> Any:
    """Returns the numbers of a record that are equal in every run of the command."""
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    if not isinstance(value, dict):
        return None
    return {
        key: part if key in _RESULTS else _numbers(part)
        for key, part in value.items()
        if key in _RESULTS or isinstance(part, dict | list)
        if key not in _OTHERS
    }


def _hash_arrays(checkpoint: pathlib.Path) -> str:
    import jax

    from inertia_jax.checkpoint import load_arrays, verify_checkpoint

    try:
        verify_checkpoint(checkpoint)
    except ValueError:
        return DAMAGED
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(load_arrays(checkpoint)):
        array = np.asarray(leaf)
        about = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(about.encode() + array.tobytes())
    return digest.hexdigest()
