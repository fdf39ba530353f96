"""The options of `python -m train fit`."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.arguments import optional, parse_options
from train.config import Config, check_used
from train.config_file import load_config
from train.machine.settings import Processes


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """The arguments that `fit` and `finetune` share."""

    run: Annotated[Config, tyro.conf.arg(name="")]
    config: str | None = None
    """Python file that defines `config`; options below override it."""
    workdir: str | None = None
    """Directory of the run; None: runs/NAME."""
    resume: bool = False
    """Resume the run in the directory, if there is one."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Processes
    )
    devices: int | None = None
    """Number of devices to use, the first ones; None: all."""
    deterministic: bool = False
    """Make training on GPU bitwise repeatable, and slower."""

    wandb: bool = False
    """Send metrics to Weights & Biases, too; the package wandb must be installed."""

    def set_flags(self) -> None:
        """Sets the flags that XLA reads when JAX first asks for a device."""
        if self.deterministic:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Fit(RunArguments):
    """Trains a network; every field of the configuration is an option."""


def early_option(argv: Sequence[str], name: str) -> str | None:
    """Reads an option alone which has a say in the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value", type=optional(str))
    value: str | None = parser.parse_known_args(argv)[0].value
    return value


def given_fields(argv: Sequence[str]) -> set[str]:
    """Returns fields that are given, for `check_used`: the network's name.

    A name would train another network than the one it says, so that even the name that
    is the default must not be given beside a factory.
    """
    is_named = any(early_option(argv, name) for name in ("--model.name", "--model"))
    return {"model.name"} if is_named else set()


def parse(argv: Sequence[str]) -> Fit:
    """Reads the configuration file, then the arguments, which override it.

    Raises:
        UsageError: The file is missing or broken, or an option has no effect beside the
            others.
    """
    path = early_option(argv, "--config")
    config = load_config(path) if path else Config()
    args = parse_options(Fit, argv, verb="fit", default=Fit(config, config=path))
    check_used(args.run, config, given_fields(argv))
    return args
