"""The time that a run adds to its steps: input, logging, progress bar, checkpoints."""

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import jax

from train.benchmark.suite import BaseSuite
from train.benchmark.timing import median_with_interval, spread_of, times_in_turn
from train.config import SourceOption
from train.config_file import load_config
from train.data import load_configured
from train.errors import UsageError
from train.experiments.sweep import with_source
from train.fit.meter import Meter, progress_bar
from train.fit.trainer import Trainer, make_metadata
from train.run.checkpoints import Checkpoints
from train.run.directory import RunDirectory
from train.step.state import training_to_dict

# The number of timed calls of an epoch's first input and of its checkpoint.
_EXTRA_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """The time that input, logging, progress bar and checkpoints add to steps."""

    config: str = "configs/cifar10_resnet18_small.py"
    """File of the run's configuration."""
    data: SourceOption = None
    """Source of the data; None: the configuration's own."""
    width: float | None = None
    """Width of the network; None: the configuration's own."""
    steps: int = 200
    """Number of steps of a block, at most those of an epoch."""
    repeats: int = 9
    """Number of blocks of each kind, at least 6."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times bare blocks of steps and blocks in the loop, in turn.

        A bare block takes its steps on an input that lies ready. A block in the loop
        uses the loop's feed, meter and progress bar, and writes one line of metrics at
        its end. (A run has such a line every `log_steps`.) Both read the totals of one
        call while the next one runs. The rest of an epoch is timed separately: its
        first input, with the shuffle before it, and one checkpoint, until it is
        written. (A run writes it while the next epoch computes.)

        Raises:
            UsageError: A block has more steps than an epoch; there are fewer than six
                blocks.
        """
        if self.repeats < 6:
            raise UsageError(
                f"`repeats` (={self.repeats}) must be >= 6 in the suite loop."
            )
        config = with_source(load_config(self.config), self.data)
        if self.width is not None:
            model = dataclasses.replace(config.model, width=self.width)
            config = dataclasses.replace(config, model=model)
        trainer = Trainer(config, load_configured(config.data))
        ready = next(trainer.inputs(0, 0))
        steps_per_call = ready[2].shape[1]
        calls = -(-self.steps // steps_per_call)
        most = trainer.steps_per_epoch // steps_per_call * steps_per_call
        steps = calls * steps_per_call
        if steps > most:
            raise UsageError(
                f"`steps` (={self.steps}) must be at most {most}, an epoch's in whole "
                f"calls."
            )
        with contextlib.ExitStack() as stack:
            run = _TimedRun(trainer, ready, calls, stack)
            times = times_in_turn(
                {"bare": run.bare_block, "whole": run.whole_block},
                repeats=self.repeats,
                prepare=run.prepare_block,
            )
            extra = times_in_turn(
                {"first_input": run.first_input, "checkpoint": run.checkpoint},
                repeats=_EXTRA_REPEATS,
                prepare=run.close_epochs,
            )
        row = {
            "steps": steps,
            "rounds": self.repeats,
            "steps_per_epoch": trainer.steps_per_epoch,
            **{name: spread_of(values) for name, values in (times | extra).items()},
            **overhead(
                times["bare"],
                times["whole"],
                [sum(both) for both in zip(*extra.values(), strict=True)],
                blocks_per_epoch=trainer.steps_per_epoch / steps,
            ),
        }
        print(self.describe(row))
        yield row

    def describe(self, row: dict[str, Any]) -> str:
        step_ms = row["bare"]["median_ms"] / row["steps"]
        first, checkpoint = (
            f"{row[name]['median_ms']:.0f} ms" for name in ("first_input", "checkpoint")
        )
        added = {name: f"{share:.2%}" for name, share in row["added_to_steps"].items()}
        interval = f"95% interval {added['low_95']} to {added['high_95']}"
        return (
            f"a bare step {step_ms:.1f} ms, {row['steps_per_epoch']} an epoch\n"
            f"an epoch's first input {first}, checkpoint {checkpoint}\n"
            f"the loop adds to steps: {added['median']} ({interval})\n"
            f"the loop adds to an epoch: {row['added_to_epoch']:.2%}"
        )


class _TimedRun:
    """A run in a scratch directory, until `stack` closes; its parts are called singly.

    Every block has `calls` calls; each call of a bare block has the inputs `ready`.
    """

    def __init__(
        self, trainer: Trainer, ready: Any, calls: int, stack: contextlib.ExitStack
    ) -> None:
        # Without this the writer thread would import it during the timed steps.
        import tensorboardX  # noqa: F401

        self._trainer, self._ready, self._calls = trainer, ready, calls
        # A block has one line of metrics, at its end.
        steps = calls * ready[2].shape[1]
        config = dataclasses.replace(trainer.config, log_steps=steps)
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = RunDirectory(scratch / "run", config, resume=False)
        stack.callback(directory.close)
        directory.lock()
        directory.open(0)
        bar = stack.enter_context(progress_bar(None, 0, config.batch_size))
        self._meter = Meter(directory, bar, config, 0, has_gates=trainer.has_gates)
        self._checkpoints = Checkpoints(directory.checkpoints)
        self._blocks = stack.enter_context(contextlib.closing(_blocks(trainer, calls)))
        self._state = trainer.init_state()
        self._block: Any = ()
        self._epochs: list[Any] = []
        self._step = self._saved = 0

    def prepare_block(self) -> None:
        """Takes the next whole block's inputs."""
        self._block = next(self._blocks)

    def bare_block(self) -> None:
        """Takes a block's steps on the inputs that lie ready."""
        pending = None
        for _ in range(self._calls):
            self._state, totals = self._trainer.train_call(self._state, self._ready)
            if pending is not None:
                jax.device_get(pending)
            pending = totals
        jax.device_get(pending)

    def whole_block(self) -> None:
        """Takes a block's steps as the loop does."""
        for inputs in self._block:
            self._state, totals = self._trainer.train_call(self._state, inputs)
            self._step += inputs[2].shape[1]
            self._meter.after_call(self._step, totals)
        self._meter.flush()

    def checkpoint(self) -> None:
        """Saves a checkpoint, and waits for it."""
        self._saved += 1
        training = training_to_dict(self._state)
        metadata = make_metadata(self._trainer, None, train_seconds=0.0)
        self._checkpoints.save(
            self._saved, self._trainer.model, self._state.result, training, metadata
        )
        self._checkpoints.wait()

    def first_input(self) -> None:
        """Shuffles an epoch, and waits for its first input."""
        self._epochs.append(self._trainer.inputs(0, 0))
        jax.block_until_ready(next(self._epochs[-1]))

    def close_epochs(self) -> None:
        """Closes the epochs whose first input was taken."""
        for epoch in self._epochs:
            epoch.close()


def overhead(
    bare: list[float],
    whole: list[float],
    extra: list[float],
    *,
    blocks_per_epoch: float,
) -> dict[str, Any]:
    """Returns the time that a loop adds to its steps, as a share of the bare steps'.

    Args:
        bare: The times of bare blocks.
        whole: The times of blocks in the loop, each paired with a bare one.
        extra: The times that an epoch spends outside its blocks.
        blocks_per_epoch: The number of blocks in an epoch.

    Returns:
        `added_to_steps`, the median of the pairs with its interval, and
        `added_to_epoch`, that median with the median of `extra`.
    """
    pairs = zip(bare, whole, strict=True)
    steps = median_with_interval([whole / bare - 1 for bare, whole in pairs])
    epoch_ms = statistics.median(bare) * blocks_per_epoch
    added = steps["median"] + statistics.median(extra) / epoch_ms
    return {"added_to_steps": steps, "added_to_epoch": added}


def _blocks(trainer: Trainer, calls: int) -> Generator[Any, None, None]:
    """Yields the inputs of one block after the other; no block crosses an epoch's end.

    An epoch's first input is made before its first block, whose time it is not part of.
    """
    for epoch in itertools.count():
        inputs = trainer.inputs(epoch, 0)
        with contextlib.closing(inputs):
            first = [next(inputs)]
            steps = calls * first[0][2].shape[1]
            for _ in range(trainer.steps_per_epoch // steps):
                left = itertools.islice(inputs, calls - len(first))
                yield itertools.chain(first, left)
                first = []
