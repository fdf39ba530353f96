"""What a run adds to its steps: input, logging, progress bar, checkpoints."""

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import jax

from train.bench_suite import BaseSuite, load_images, with_source
from train.checkpoints import Checkpoints
from train.config import Config
from train.config_file import load_config
from train.data import ImageSet
from train.errors import UsageError
from train.meter import Meter, progress_bar
from train.rundir import RunDirectory
from train.state import training_to_dict
from train.timing import median_with_interval, spread_of, times_in_turn
from train.trainer import Trainer, make_metadata

# Of what is timed by itself: a checkpoint, an epoch's first input.
_EXTRA_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """What a run adds to its steps: input, logging, progress bar, checkpoints."""

    config: str = "configs/cifar10_resnet18_small.py"
    """File of the run's configuration."""
    data: str | None = None
    """Source of the data; None: the configuration's own."""
    width: float | None = None
    """Width of the network; None: the configuration's own."""
    steps: int = 200
    """Steps of a block, at most an epoch's."""
    repeats: int = 9
    """Blocks of each kind, at least 6."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times blocks of steps bare and in the loop, and what an epoch adds."""
        config = with_source(load_config(self.config), self.data)
        if self.width is not None:
            model = dataclasses.replace(config.model, width=self.width)
            config = dataclasses.replace(config, model=model)
        images = load_images(config.data)
        row = bench_loop(config, images, steps=self.steps, rounds=self.repeats)
        print(format_loop(row))
        yield row


def bench_loop(config: Config, data: ImageSet, *, steps: int, rounds: int) -> Any:
    """Times blocks of steps bare and in the loop, in turn, and what an epoch adds.

    A bare block takes its steps on an input that lies ready, the other one on the
    loop's own feed, with its meter, progress bar and one line of metrics, at its end.
    (A run has such a line every `log_steps`.) Both read the totals of one call while
    the next one runs. What an epoch adds is timed by itself: its first input, with the
    shuffle before it, and one checkpoint, waited for. (In a run it is written while the
    next epoch computes.)

    Args:
        config: Of the run.
        data: Its images.
        steps: Of a block; rounded up to whole calls.
        rounds: Blocks of each.

    Returns:
        Times of blocks and of what an epoch adds, and what `overhead` makes of them.

    Raises:
        UsageError: More steps than an epoch has; fewer than six rounds.
    """
    if rounds < 6:
        raise UsageError(f"`repeats` (={rounds}) must be >= 6 in the suite loop.")
    trainer = Trainer(config, data)
    state = trainer.init_state()
    ready = next(trainer.inputs(0, 0))
    rows = ready[2].shape[1]  # steps a call
    calls, in_epoch = -(-steps // rows), trainer.steps_per_epoch // rows
    if calls > in_epoch:
        raise UsageError(
            f"`steps` (={steps}) must be at most {in_epoch * rows}, an epoch's in "
            f"whole calls."
        )
    config = dataclasses.replace(config, log_steps=calls * rows)
    # Else the thread that writes events does so, among the steps.
    import tensorboardX  # noqa: F401

    with contextlib.ExitStack() as stack:
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = RunDirectory(scratch / "run", config, resume=False)
        stack.callback(directory.close)
        directory.lock()
        directory.open(0)
        checkpoints = Checkpoints(directory.checkpoints)
        bar = stack.enter_context(progress_bar(None, 0, config.batch_size))
        meter = Meter(directory, bar, config, 0, has_gates=trainer.has_gates)
        blocks = _blocks(trainer, calls)
        stack.callback(blocks.close)
        saved = step = 0
        inputs: Any = None

        def prepare() -> None:
            nonlocal inputs
            inputs = next(blocks)

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
            for batch in inputs:
                state, totals = trainer.train_call(state, batch)
                step += rows
                meter.after_call(step, totals)
            meter.flush()

        def checkpoint() -> None:
            nonlocal saved
            saved += 1
            training = training_to_dict(state)
            metadata = make_metadata(trainer, None, train_seconds=0.0)
            checkpoints.save(saved, trainer.model, state.result, training, metadata)
            checkpoints.wait()

        epochs: list[Any] = []

        def first_input() -> None:
            epochs.append(trainer.inputs(0, 0))
            jax.block_until_ready(next(epochs[-1]))

        times = times_in_turn(
            {"bare": bare, "whole": whole},
            repeats=rounds,
            calls_before=0,
            prepare=prepare,
        )
        extra = times_in_turn(
            {"first_input": first_input, "checkpoint": checkpoint},
            repeats=_EXTRA_REPEATS,
            calls_before=0,
            prepare=lambda: [epoch.close() for epoch in epochs],
        )
    return {
        "steps": calls * rows,
        "rounds": rounds,
        "steps_per_epoch": trainer.steps_per_epoch,
        **{name: spread_of(values) for name, values in (times | extra).items()},
        **overhead(
            times["bare"],
            times["whole"],
            [sum(both) for both in zip(*extra.values(), strict=True)],
            blocks_per_epoch=trainer.steps_per_epoch / (calls * rows),
        ),
    }


def format_loop(row: dict[str, Any]) -> str:
    """Returns what the loop adds, as lines."""
    step_ms = row["bare"]["median_ms"] / row["steps"]
    first_ms, checkpoint_ms = (
        row[name]["median_ms"] for name in ("first_input", "checkpoint")
    )
    added = {name: f"{share:.2%}" for name, share in row["added_to_steps"].items()}
    interval = f"95% interval {added['low_95']} to {added['high_95']}"
    return (
        f"a bare step {step_ms:.1f} ms, {row['steps_per_epoch']} an epoch\n"
        f"an epoch's first input {first_ms:.0f} ms, checkpoint {checkpoint_ms:.0f} ms\n"
        f"the loop adds to steps: {added['median']} ({interval})\n"
        f"the loop adds to an epoch: {row['added_to_epoch']:.2%}"
    )


def overhead(
    bare: list[float],
    whole: list[float],
    extra: list[float],
    *,
    blocks_per_epoch: float,
) -> dict[str, Any]:
    """Returns what a loop adds to its steps, as a share of bare steps' time.

    Args:
        bare: Times of bare blocks.
        whole: Of blocks in the loop, each beside a bare one.
        extra: Of what every epoch adds beside its blocks.
        blocks_per_epoch: Blocks an epoch has.

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
    """Yields the inputs of so many calls, again and again, all of one epoch.

    The first of an epoch's inputs lies ready, as what an epoch adds is not theirs.
    """
    for epoch in itertools.count():
        inputs = trainer.inputs(epoch, 0)
        with contextlib.closing(inputs):
            first = [next(inputs)]
            rows = first[0][2].shape[1]
            for _ in range(trainer.steps_per_epoch // rows // calls):
                yield itertools.chain(
                    first, itertools.islice(inputs, calls - len(first))
                )
                first = []
