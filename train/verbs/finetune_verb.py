"""`python -m train finetune`: train a checkpoint's network further."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import tyro

from inertia_jax import load_checkpoint
from inertia_jax.checkpoint import load_metadata
from inertia_jax.models import model_name
from train.checkpoints import find_checkpoint
from train.config import Config, Model, Optimizer, load_config
from train.errors import UsageError, user_input
from train.loop import fit
from train.verbs.fit_verb import exit_code, summary

# A tenth of the recipe's learning rate, and an end within a few epochs.
_DEFAULTS = Config(
    name="finetune",
    epochs=5,
    optimizer=Optimizer(learning_rate=0.01, schedule="cosine"),
)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Trains a checkpoint's network further; network and normalisation are its own."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run, whose best is taken."""
    run: Annotated[Config, tyro.conf.arg(name="")]
    config: str | None = None
    """Python file that defines `config`; options below override it."""
    workdir: str | None = None
    """Directory of the run; None: runs/NAME."""
    resume: bool = False
    """Go on with the run in the directory, if there is one."""


def run(argv: Sequence[str]) -> int:
    """Trains as the arguments say, and prints where things lie."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    file = early.parse_known_args(argv)[0].config
    config = load_config(file) if file else _DEFAULTS
    default = Finetune("", config, config=file)
    args = tyro.cli(
        Finetune,
        default=dataclasses.replace(default, checkpoint=tyro.MISSING),
        args=argv,
        prog="python -m train finetune",
    )
    config = from_checkpoint(args.run, find_checkpoint(args.checkpoint))
    workdir = pathlib.Path(args.workdir or f"runs/{config.name}").expanduser()
    result = fit(config, workdir=workdir, resume=args.resume)
    print(summary(result))
    return exit_code(result)


def from_checkpoint(config: Config, path: pathlib.Path) -> Config:
    """Returns the configuration that trains a checkpoint's network further.

    Raises:
        UsageError: The checkpoint is damaged, or has no preprocessing.
    """
    with user_input():
        model, _ = load_checkpoint(path)
        preprocessing = load_metadata(path).preprocessing
    if preprocessing is None:
        raise UsageError(f"{path} has no preprocessing; it cannot be trained further.")
    network = Model(
        name=model_name(model),
        width=model.width,
        stem=getattr(model, "stem", Model.stem),
        shortcut=getattr(model, "shortcut", Model.shortcut),
        dtype=np.dtype(model.dtype).name,
        plan=model.plan.to_json(),
    )
    data = dataclasses.replace(
        config.data,
        mean=preprocessing.mean,
        std=preprocessing.std,
        image_size=preprocessing.image_shape[0],
        eval_resize=preprocessing.resize,
    )
    return dataclasses.replace(
        config, init=str(path.absolute()), model=network, data=data
    )
