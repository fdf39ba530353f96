"""Several processes: how they join, and how all of them end when one does."""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.arguments import optional
from train.errors import UsageError
from train.machine.settings import Processes

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, it may be run again.
EXIT_LOST = 75
# Seconds between two tries to reach process 0.
_RETRY_SECONDS = 0.2
# Process 0, whose end ends the others, waits so long for them to print their errors.
_GRACE_SECONDS = 2
# Words in the errors of collectives on CPU (Gloo) and GPU (NCCL), and of the service
# that counts processes.
_LOST = re.compile(
    r"gloo|nccl|coordination|barrier|heartbeat|socket|connection|deadline", re.I
)
# Errors of the same libraries that a restart would not cure.
_NOT_LOST = re.compile(r"RESOURCE_EXHAUSTED|INVALID_ARGUMENT|ncclCommInit")


def say(words: str) -> None:
    """Prints what the program does next, on the first process.

    It goes to standard error, beside the progress.
    """
    if jax.process_index() == 0:
        print(words, file=sys.stderr, flush=True)


@functools.cache
def warn(text: str) -> None:
    """Prints a warning on standard error: on the first process, and only once."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr)


def early_processes(argv: Sequence[str]) -> Processes:
    """Reads these options alone, for a verb that must join before it reads the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in dataclasses.fields(Processes):
        spellings = {f"--{field.name.replace('_', '-')}", f"--{field.name}"}
        kind = str if "str" in str(field.type) else int
        parser.add_argument(*spellings, type=optional(kind))
    given = vars(parser.parse_known_args(argv)[0])
    return Processes(**{name: x for name, x in given.items() if x is not None})


@contextlib.contextmanager
def joined(options: Processes, *, saves_on_sigterm: bool = True) -> Iterator[None]:
    """Joins the other processes, if there are any; an error inside ends this one.

    It ends at once, with one message: a program that ends as usual waits for all others
    in `jax.distributed`'s last barrier, while they wait for it in a collective.

    Args:
        options: How many processes there are, and where they meet.
        saves_on_sigterm: Whether JAX notes SIGTERM for the loop to ask about; without
            it, the signal ends the process.

    Raises:
        UsageError: The others cannot be joined. (If process 0 is there and another
            never comes, JAX itself ends those that wait, with exit code 134.)
    """
    if options.coordinator is None:
        for name, default in vars(Processes()).items():
            given = getattr(options, name)
            if given != default:
                raise UsageError(f"`{name}` (={given}) needs `--coordinator`.")
        yield
        return
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    _join(options)
    try:
        yield
    except BaseException as error:
        _end(error)


def first_devices(number: int | None) -> list[jax.Device]:
    """Returns the devices to run on: the first `number`, or all.

    Raises:
        UsageError: There are fewer, or other processes have some of them.
    """
    devices = jax.devices()
    if number is None:
        return devices
    if not 1 <= number <= len(devices):
        raise UsageError(f"`devices` (={number}) must be in [1, {len(devices)}].")
    if jax.process_count() > 1:
        raise UsageError(f"`devices` (={number}) is for one process; several use all.")
    return devices[:number]


def is_lost(error: BaseException) -> bool:
    """Returns whether an error says that another process is gone."""
    text = str(error)
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and jax.process_count() > 1
        and _LOST.search(text) is not None
        and _NOT_LOST.search(text) is None
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
    # This is printed first: JAX's own abort does not say which process is missing.
    print(
        f"joining the other processes by {options.coordinator}, for at most "
        f"{options.join_seconds} s",
        file=sys.stderr,
    )
    if address is not None and options.process_id != 0:
        _wait_for(address, options.join_seconds)
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


def _wait_for(address: str, seconds: int) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"no process 0 answers at `coordinator` (={address}) within "
                    f"`join_seconds` (={seconds}): {error}."
                ) from error
        time.sleep(_RETRY_SECONDS)


def _end(error: BaseException) -> NoReturn:
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        # The parser ends this way after help and after options that it refuses. It has
        # said so itself.
        _leave(error.code or 0)
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
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_GRACE_SECONDS)
    os._exit(code)


def differing_process(digest: bytes) -> int | None:
    """Returns a process whose digest is not that of process 0, or None.

    All processes call, with digests of one length, and all are told the same.
    """
    if jax.process_count() == 1:
        return None
    mine = np.frombuffer(digest, np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(mine))
    differing = np.flatnonzero((digests != digests[0]).any(1)).tolist()
    return differing[0] if differing else None
