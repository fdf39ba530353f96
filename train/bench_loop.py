"""What a run adds to its steps: input, logging, progress bar, checkpoints."""

import itertools
import pathlib
import tempfile
from typing import Any

import jax
from tqdm import tqdm

from train.checkpoints import Checkpoints
from train.config import Config
from train.data import ImageSet
from train.errors import UsageError
from train.meter import Meter
from train.rundir import RunDirectory
from train.state import training_to_dict
from train.timing import interleaved
from train.trainer import Trainer, make_metadata


def bench_loop(config: Config, data: ImageSet, *, steps: int, rounds: int) -> Any:
    """Times calls bare, and with input, logging, progress bar and a checkpoint.

    Each round takes the same number of steps on inputs that lie ready, and with the
    loop's own feed, meter and one checkpoint, waited for, each once untimed and then
    timed. Both read the totals of one call while the next one runs.

    Raises:
        UsageError: More steps than an epoch has.
    """
    trainer = Trainer(config, data)
    if steps > trainer.steps_per_epoch:
        raise UsageError(
            f"`steps` (={steps}) must be at most {trainer.steps_per_epoch}, an epoch."
        )
    calls = -(-steps // trainer.steps_per_call)
    state = trainer.init_state()
    ready = next(trainer.inputs(0, 0))
    rounds_done = 0
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
            nonlocal state, rounds_done
            step = 0
            with tqdm(total=steps * config.batch_size, unit="img", leave=False) as bar:
                meter = Meter(directory, bar, config, step, has_gates=trainer.has_gates)
                inputs = trainer.inputs(0, 0)
                for batch in itertools.islice(inputs, calls):
                    state, totals = trainer.train_call(state, batch)
                    step += batch[2].shape[1]
                    meter.after_call(step, totals)
                meter.flush()
            rounds_done += 1
            training = training_to_dict(state)
            metadata = make_metadata(trainer, None, train_seconds=0.0)
            checkpoints.save(
                rounds_done, trainer.model, state.result, training, metadata
            )
            checkpoints.wait()

        times = interleaved({"bare": bare, "whole": whole}, repeats=rounds, warmup=0)
        directory.close()
    return {"steps": calls * trainer.steps_per_call, "rounds": rounds, **times}
