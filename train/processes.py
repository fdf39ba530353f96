"""Several processes: how they join, and how all of them end when one does."""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax

from train.errors import UsageError

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, it may be run again.
EXIT_LOST = 75
# How long process 0, whose end ends the others, lets them say what happened.
_GRACE_SECONDS = 2
# Of collectives on CPU (Gloo) and GPU (NCCL), and of the service that counts processes.
_LOST = re.compile(
    r"gloo|nccl|coordination|barrier|heartbeat|socket|connection|deadline", re.I
)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many."""

    coordinator: str | None = None
    """HOST:PORT of process 0 of several; `auto` asks the cluster: SLURM, Open MPI,
    Kubernetes or a TPU pod."""
    num_processes: int | None = None
    """Processes of all hosts."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    join_seconds: int = 300
    """How long to wait until all have started."""
    dead_seconds: int = 60
    """A process not heard of for so long is dead, and the others end."""


def early_processes(argv: Sequence[str]) -> Processes:
    """Reads these options alone, for a verb that must join before it reads the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in dataclasses.fields(Processes):
        spellings = {f"--{field.name.replace('_', '-')}", f"--{field.name}"}
        parser.add_argument(*spellings, type=str if "str" in str(field.type) else int)
    given = vars(parser.parse_known_args(argv)[0])
    return Processes(**{name: x for name, x in given.items() if x is not None})


@contextlib.contextmanager
def joined(options: Processes) -> Iterator[None]:
    """Joins the other processes, if there are any; an error inside ends this one.

    It ends at once, with one message: a program that ends as usual waits for all others
    in `jax.distributed`'s last barrier, while they wait for it in a collective.

    Raises:
        UsageError: The others cannot be joined.
    """
    if options.coordinator is None:
        if options.num_processes is not None or options.process_id is not None:
            raise UsageError(
                "`--num-processes` and `--process-id` need `--coordinator`."
            )
        yield
        return
    _join(options)
    try:
        yield
    except BaseException as error:
        _end(error)


def is_lost(error: BaseException) -> bool:
    """Returns whether an error says that another process is gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(
        jax.process_count() > 1 and _LOST.search(str(error))
    )


def _join(options: Processes) -> None:
    for name in ("join_seconds", "dead_seconds"):
        if getattr(options, name) < 1:
            raise UsageError(f"`{name}` (={getattr(options, name)}) must be >= 1.")
    address = options.coordinator
    if address == "auto":
        address = None
    elif not re.fullmatch(r".+:\d+", address or ""):
        raise UsageError(f"`coordinator` (={address}) must be HOST:PORT or `auto`.")
    try:
        jax.distributed.initialize(
            address,
            options.num_processes,
            options.process_id,
            initialization_timeout=options.join_seconds,
            heartbeat_timeout_seconds=options.dead_seconds,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        if "should be defined" in str(error) and address is None:
            raise UsageError(
                "`coordinator` (=auto) finds no cluster that JAX knows: SLURM (started "
                "by srun), Open MPI (mpirun), Kubernetes (a Job, and the package "
                "`kubernetes`) or a TPU pod. Give HOST:PORT of process 0, "
                "`--num-processes` and `--process-id`."
            ) from error
        raise UsageError(f"could not join the other processes: {error}") from error


def _end(error: BaseException) -> NoReturn:
    if is_lost(error):
        reason = str(error).splitlines()[0]
        code = EXIT_LOST
        message = (
            f"another process of this run is gone, and this one ends ({reason}). The "
            f"same command with --resume goes on from the last checkpoint, on any "
            f"number of processes."
        )
    elif isinstance(error, UsageError):
        code, message = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = 130, "interrupted."
    else:
        traceback.print_exception(error)
        code, message = 1, f"{type(error).__name__}; the others are ended, too."
    print(f"error: process {jax.process_index()}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_GRACE_SECONDS)
    os._exit(code)
