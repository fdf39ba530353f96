"""The training loop: epochs, logging, evaluation, checkpoints, signals."""

import dataclasses
import hashlib
import json
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from inertia_jax import count_cost
from inertia_jax.metadata import load_metadata
from train.checkpoints import Checkpoints
from train.clock import TrainingClock
from train.config import Config
from train.config_file import config_to_json, differing_fields
from train.data import ImageSet, load_data
from train.errors import UsageError
from train.evaluate import Evaluation
from train.meter import Meter, progress_bar
from train.processes import differing_process, is_lost
from train.rundir import RunDirectory
from train.state import TrainState, training_to_dict
from train.stop import StopSignal
from train.teacher import resolve_teacher
from train.trainable import describe_trained
from train.trainer import Trainer, make_metadata


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        workdir: Its directory.
        step: Steps taken in all.
        evaluation: Of the last epoch; None if the run was stopped before its end.
        stopped_by: The signal that stopped it, or None.
    """

    workdir: pathlib.Path
    step: int
    evaluation: Evaluation | None
    stopped_by: int | None


def fit(
    config: Config, *, workdir: pathlib.Path, resume: bool, devices: Any = None
) -> FitResult:
    """Trains, evaluates after every epoch, and keeps checkpoints.

    Args:
        config: Of the run.
        workdir: Its directory.
        resume: Go on with the run in `workdir`, if there is one.
        devices: To run on; None means all.

    Raises:
        UsageError: Bad input, a loss that is not finite, or a full disk; says what, and
            leaves the last good checkpoint.
    """
    config = resolve_teacher(config)
    directory = RunDirectory(workdir, config, resume=resume)
    data = load_data(
        config.data.source,
        cache_dir=config.data.cache_dir,
        image_size=config.data.load_size,
    )
    _check_agreement(config, data)
    trainer = Trainer(config, data, devices)
    state = trainer.init_state()
    directory.lock()
    checkpoints = Checkpoints(directory.checkpoints)
    try:
        state, step, seconds = _restore(trainer, state, checkpoints, resume=resume)
        directory.open(step)
        with StopSignal() as stop, TrainingClock(seconds) as clock:
            return _run(trainer, state, step, directory, checkpoints, stop, clock)
    except jax.errors.JaxRuntimeError as error:
        if is_lost(error):
            checkpoints.abandon()
        raise
    finally:
        try:
            # Also after an error: the last good one may be under way, and until it is
            # done nobody else may have the directory.
            checkpoints.wait()
        finally:
            directory.close()


def _check_agreement(config: Config, data: ImageSet) -> None:
    """Raises UsageError where processes were given other runs: they would hang."""
    # Places may differ from machine to machine; what lies there may not.
    places = dataclasses.replace(config.data, source="", cache_dir="")
    said = {
        "configuration": config_to_json(dataclasses.replace(config, data=places)),
        "data": data.describe(),
    }
    for name, value in said.items():
        text = json.dumps(value, sort_keys=True).encode()
        other = differing_process(hashlib.sha256(text).digest())
        if other is not None:
            raise UsageError(
                f"the {name} of process {other} is not that of process 0; all "
                f"must run the same command on the same data."
            )


def _restore(
    trainer: Trainer, state: TrainState, checkpoints: Checkpoints, *, resume: bool
) -> tuple[TrainState, int, float]:
    step, seconds = 0, 0.0
    restored = checkpoints.restore() if resume else None
    if restored is not None:
        path, arrays = restored
        _check_same_sources(path, trainer)
        state = trainer.restore(state, arrays)
        step = int(arrays["training"]["step"])
        # Of an older version none: reports then leave the seconds out.
        seconds = load_metadata(path).info.get("train_seconds", 0.0)
    else:
        state = trainer.read_init(state)
    if jax.process_count() > 1:
        first = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if first != step:
            raise UsageError(
                f"process {jax.process_index()} finds step {step}, process 0 step "
                f"{first}; the run's directory must be one that all share."
            )
    if restored is not None and jax.process_index() == 0:
        tqdm.write(f"resuming from {path}, step {step} of {trainer.steps}")
    return state, step, seconds


def _check_same_sources(path: pathlib.Path, trainer: Trainer) -> None:
    there = load_metadata(path).info
    differing = differing_fields(there.get("data"), trainer.data.describe())
    if differing:
        raise UsageError(
            f"{path} was trained on other data; nothing was changed: "
            f"{'; '.join(differing)}."
        )
    if there.get("teacher_sha256") != trainer.teacher_sha256:
        raise UsageError(
            f"{path} had another teacher than {trainer.config.teacher} holds now; "
            f"nothing was changed."
        )


def _run(
    trainer: Trainer,
    state: TrainState,
    step: int,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    stop: StopSignal,
    clock: TrainingClock,
) -> FitResult:
    config, spe = trainer.config, trainer.steps_per_epoch
    if trainer.has_gates and jax.process_index() == 0:
        shape = trainer.preprocessing.image_shape
        tqdm.write(f"{count_cost(trainer.model, shape)}\n")
    trained = trainer.update.trained
    if trained is not None and jax.process_index() == 0:
        tqdm.write(describe_trained(state.params, trained))
    dropped = len(trainer.data.train or ()) - spe * config.batch_size
    if dropped and jax.process_index() == 0:
        tqdm.write(f"the last {dropped} images of each epoch's shuffle are left out")
    evaluation: Evaluation | None = None
    last_save = time.monotonic()

    def save(evaluation: Evaluation | None) -> None:
        nonlocal last_save
        metadata = make_metadata(trainer, evaluation, train_seconds=clock.seconds)
        training = training_to_dict(state)
        checkpoints.save(step, trainer.model, state.result, training, metadata)
        last_save = time.monotonic()

    with progress_bar(trainer.steps, step, config.batch_size) as bar:
        for epoch in range(step // spe, config.epochs):
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
            has_gates = trainer.has_gates
            meter = Meter(directory, bar, config, step, has_gates=has_gates)
            clock.start()
            for inputs in trainer.inputs(epoch, step - epoch * spe):
                state, totals = trainer.train_call(state, inputs)
                before, step = step, step + inputs[2].shape[1]
                # One call behind, so that the devices need not wait for the host.
                meter.after_call(step, totals)
                stopped_by = stop.after_call()
                at_epoch_end = step == (epoch + 1) * spe
                if stopped_by is not None:
                    meter.flush()
                    if not at_epoch_end:
                        save(None)
                        checkpoints.wait()
                        return FitResult(directory.path, step, None, stopped_by)
                elif not at_epoch_end and _is_save_due(config, before, step, last_save):
                    meter.flush()
                    save(None)
            meter.flush()
            clock.stop()
            words = meter.log_epoch(epoch, clock.seconds)
            evaluation = trainer.evaluate(state)
            directory.log(step, "test", {"epoch": epoch + 1, **evaluation.metrics()})
            if jax.process_index() == 0:
                bar.write(
                    f"epoch {epoch + 1:3d}  {words}  test loss {evaluation.loss:.4f}  "
                    f"test top-1 {evaluation.top1:.2%}",
                    file=sys.stdout,
                )
            save(evaluation)
            # A signal that came during the evaluation is seen here, where all processes
            # know it; of several, else after the next call.
            stopped_by = stopped_by or stop.received
            if stopped_by is not None and step < trainer.steps:
                checkpoints.wait()
                return FitResult(directory.path, step, None, stopped_by)
    checkpoints.wait()
    if evaluation is None:  # resumed after its end
        evaluation = trainer.evaluate(state)
    return FitResult(directory.path, step, evaluation, None)


def _is_save_due(config: Config, before: int, step: int, last_save: float) -> bool:
    every = config.checkpoint_steps
    if every is not None and step // every > before // every:
        return True
    is_late = (time.monotonic() - last_save) / 60 >= config.checkpoint_minutes
    if jax.process_count() > 1:
        # All write, so all go by the clock of the first. They ask it only as often as
        # metrics are logged: the devices wait meanwhile.
        if step // config.log_steps == before // config.log_steps:
            return False
        is_late = bool(multihost_utils.broadcast_one_to_all(np.int32(is_late)))
    return is_late


def exit_code(result: FitResult) -> int:
    """Returns 130 after Ctrl-C; SIGTERM is how clusters ask, and saving is success."""
    return 130 if result.stopped_by == signal.SIGINT else 0


def summary(result: FitResult) -> str:
    """Returns how a run ended and where things lie."""
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        return (
            f"stopped by {name} and saved at step {result.step}; the same command with "
            f"--resume goes on."
        )
    evaluation = result.evaluation
    if evaluation is None:
        raise ValueError("a run that was not stopped has an evaluation.")
    return (
        f"test top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%}, loss "
        f"{evaluation.loss:.4f} on {evaluation.num_examples:,} images\n"
        f"checkpoints  {result.workdir}/checkpoints\n"
        f"metrics      {result.workdir}/metrics.jsonl, {result.workdir}/tensorboard\n"
        f"evaluate     python -m train evaluate {result.workdir}"
        f"{' --flip-test' if evaluation.flip_test else ''}"
    )
