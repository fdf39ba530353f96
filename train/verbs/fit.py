"""`python -m train fit`: train a network."""

import pathlib
from collections.abc import Sequence

import jax

from train.fit.loop import exit_code, fit, result_to_json, summary
from train.machine.processes import first_devices, joined
from train.options.fit import RunArguments, parse
from train.result import add_result


def run(argv: Sequence[str]) -> int:
    """Trains as the arguments say."""
    args = parse(argv)
    args.set_flags()
    with joined(args.processes):
        return train(args)


def train(args: RunArguments) -> int:
    """Trains, prints where the results are, and returns the exit code."""
    devices = first_devices(args.devices)
    workdir = pathlib.Path(args.workdir or f"runs/{args.run.name}").expanduser()
    result = fit(
        args.run,
        workdir=workdir,
        resume=args.resume,
        devices=devices,
        wandb=args.wandb,
    )
    if jax.process_index() == 0:
        print(summary(result))
    add_result(result_to_json(result))
    return exit_code(result)
