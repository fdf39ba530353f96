"""`python -m train finetune`: train a checkpoint's network further."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from train.config import FINETUNE, Config, Data, check_used
from train.config_file import load_config
from train.data.held_out import HELD_OUT, source_name
from train.errors import UsageError, shortened
from train.machine.processes import early_processes, joined, say
from train.networks import from_checkpoint, read_description
from train.options.finetune import parse
from train.options.fit import early_option, given_fields
from train.run.checkpoints import find_checkpoint
from train.verbs.fit import train

# Fields of `data` that must stay those of the network's training.
_ITS_OWN = ("mean", "std", "image_size", "eval_resize")


def run(argv: Sequence[str]) -> int:
    """Trains as the arguments say."""
    if {"-h", "--help"} & set(argv):  # help needs no other process
        return _run(argv)
    # Processes are joined before the checkpoint, which has the options' defaults, is
    # read.
    with joined(early_processes(argv)):
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    file = early_option(argv, "--config")
    default = load_config(file) if file else FINETUNE
    # The checkpoint gives the defaults of the options that follow it.
    path = None
    if argv and not argv[0].startswith("-"):
        path = find_checkpoint(argv[0])
        factory = early_option(argv, "--model.factory")
        network = read_description(path, factory=factory)
        default = from_checkpoint(default, network, keep_data=file is not None)
        if file is None:
            default = dataclasses.replace(
                default, name=f"{default.name}_{_checkpoint_name(argv[0])}"
            )
        default = _without_held_out(default, argv)
    args = parse(argv, default, file=file)
    args.set_flags()
    if path is None:
        raise UsageError("`checkpoint` must be given, before the options.")
    config = args.run
    check_used(config, default, given_fields(argv))
    for name in ("init", "model"):
        _check_kept(name, getattr(default, name), getattr(config, name))
    for name in _ITS_OWN:
        own, given = getattr(default.data, name), getattr(config.data, name)
        # Images that had the input's size when they were stored may be others now.
        if name != "image_size" or own is not None:
            _check_kept(name, own, given)
    if not config.data.source:
        raise UsageError(f"{path} names no data; say which with --data.")
    if file is None and network.unknown_augmentation:
        used = " and ".join(
            f"`data.{name}` (={getattr(config.data, name)})"
            for name in network.unknown_augmentation
        )
        say(f"{path} does not say how its images were augmented; this run has {used}")
    return train(args)


def _without_held_out(default: Config, argv: Sequence[str]) -> Config:
    """Returns defaults that hold nothing out where the images are to be others."""
    given = early_option(argv, "--data") or early_option(argv, "--data.source")
    if given is None or source_name(given) == source_name(default.data.source):
        return default
    nothing = {name: getattr(Data, name) for name in HELD_OUT}
    return dataclasses.replace(
        default, data=dataclasses.replace(default.data, **nothing)
    )


def _checkpoint_name(given: str) -> str:
    """Returns the name of a checkpoint or a run, by which its fine-tuning is called."""
    path = pathlib.Path(os.path.abspath(pathlib.Path(given).expanduser()))
    if path.name == "checkpoints":
        path = path.parent
    if re.fullmatch(r"step_\d+", path.name) and path.parent.name == "checkpoints":
        return f"{path.parents[1].name}_{path.name}"
    return path.name


def _check_kept(name: str, own: Any, given: Any) -> None:
    if own != given:
        raise UsageError(
            f"`{name}` (={shortened(given)}) must be the checkpoint's, "
            f"{shortened(own)}."
        )
