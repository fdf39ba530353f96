"""What a run adds to its steps: input, logging, progress bar, checkpoints."""

import itertools
import pathlib
import tempfile
from collections.abc import Generator
from typing import Any

import jax

from train.checkpoints import Checkpoints
from train.config import Config
from train.data import ImageSet
from train.errors import UsageError
from train.meter import Meter, progress_bar
from train.rundir import RunDirectory
from train.state import training_to_dict
from train.timing import median_with_interval, spread_of, times_in_turn
from train.trainer import Trainer, make_metadata


def bench_loop(config: Config, data: ImageSet, *, steps: int, rounds: int) -> Any:
    """Times blocks of steps bare and in the loop, in turn, and what an epoch adds.

    A bare block takes its steps on an input that lies ready, the other one on the
    loop's own feed, with its meter and progress bar, over epochs that go on from block
    to block. Both read the totals of one call while the next one runs. What an epoch
    adds is timed beside them: its first input, with the shuffle before it, and one
    checkpoint, waited for. (In a run it is written while the next epoch computes.)

    Returns:
        Times of blocks and of what an epoch adds; what the loop adds to a step, as a
        share of it, the median of all pairs of blocks; and what it adds to an epoch.

    Raises:
        UsageError: More steps than an epoch has; fewer than six rounds.
    """
    if rounds < 6:
        raise UsageError(f"`repeats` (={rounds}) must be >= 6 in the suite loop.")
    trainer = Trainer(config, data)
    if steps > trainer.steps_per_epoch:
        raise UsageError(
            f"`steps` (={steps}) must be at most {trainer.steps_per_epoch}, an epoch."
        )
    calls = -(-steps // trainer.steps_per_call)
    state = trainer.init_state()
    ready = next(trainer.inputs(0, 0))
    saved = step = 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory(pathlib.Path(scratch) / "run", config, resume=False)
        directory.lock()
        directory.open(0)
        checkpoints = Checkpoints(directory.checkpoints)

        def bare() -> None:
            nonlocal state
            pending = None
            for _ in range(calls):
                state, totals = trainer.train_call(state, ready)
                if pending is not None:
                    jax.device_get(pending)
                pending = totals
            jax.device_get(pending)

        def whole() -> None:
            nonlocal state, step
            for batch in itertools.islice(inputs, calls):
                state, totals = trainer.train_call(state, batch)
                step += batch[2].shape[1]
                meter.after_call(step, totals)
            meter.flush()

        def checkpoint() -> None:
            nonlocal saved
            saved += 1
            training = training_to_dict(state)
            metadata = make_metadata(trainer, None, train_seconds=0.0)
            checkpoints.save(saved, trainer.model, state.result, training, metadata)
            checkpoints.wait()

        def first_input() -> None:
            jax.block_until_ready(next(trainer.inputs(0, 0)))

        with progress_bar(None, 0, config.batch_size) as bar:
            meter = Meter(directory, bar, config, step, has_gates=trainer.has_gates)
            inputs = _epochs(trainer)
            blocks = times_in_turn(
                {"bare": bare, "whole": whole}, repeats=rounds, calls_before=0
            )
            inputs.close()
        extra = times_in_turn(
            {"first_input": first_input, "checkpoint": checkpoint},
            repeats=min(rounds, 10),
            calls_before=0,
        )
        directory.close()
    times = {name: spread_of(values) for name, values in (blocks | extra).items()}
    pairs = zip(blocks["bare"], blocks["whole"], strict=True)
    added = median_with_interval([whole / bare - 1 for bare, whole in pairs])
    num_steps = calls * trainer.steps_per_call
    epoch_ms = times["bare"]["median_ms"] / num_steps * trainer.steps_per_epoch
    extra_ms = times["first_input"]["median_ms"] + times["checkpoint"]["median_ms"]
    return {
        "steps": num_steps,
        "rounds": rounds,
        "steps_per_epoch": trainer.steps_per_epoch,
        **times,
        "added_to_steps": added,
        "added_to_epoch": {k: v + extra_ms / epoch_ms for k, v in added.items()},
    }


def _epochs(trainer: Trainer) -> Generator[Any, None, None]:
    for epoch in itertools.count():
        yield from trainer.inputs(epoch, 0)
