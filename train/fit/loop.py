"""The training loop: epochs, logging, evaluation, checkpoints, signals."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from inertia_jax import count_cost
from inertia_jax.metadata import (
    best_step,
    checkpoint_path,
    latest_steps,
    load_metadata,
)
from train.command import shell_command
from train.config import Config
from train.config_file import (
    config_to_json,
    differing_fields,
    fill_defaults,
    without_places,
)
from train.data import ImageSet, load_configured
from train.data.statistics import warn_of_normalisation
from train.errors import UsageError, user_input
from train.evaluate.evaluation import Evaluation
from train.fit.announce import describe_run, first_images, gate_histograms
from train.fit.best import Best
from train.fit.checks import warn_of_learning_rate, warn_of_unreached
from train.fit.clock import TrainingClock
from train.fit.initial import check_initial, named_as, verify_initial
from train.fit.meter import Meter, progress_bar
from train.fit.pace import Pace
from train.fit.stop import StopSignal
from train.fit.teacher import resolve_teacher
from train.fit.trainer import Trainer, make_metadata
from train.machine.processes import differing_process, is_lost, say
from train.machine.waiting import refreshed
from train.networks import check_model
from train.run.checkpoints import Checkpoints
from train.run.directory import RunDirectory
from train.run.wandb_log import import_wandb
from train.step.state import TrainState, training_to_dict
from train.step.trainable import describe_trained

# What a run may change on its way, by an edit of its config.json: its name and length,
# the places of its files, and how often and in what portions something is done.
_CHANGEABLE = {
    *("name", "epochs", "early_stopping", "init", "teacher", "parallel"),
    *("steps_per_call", "eval_batch_size", "log_steps"),
    *("checkpoint_steps", "checkpoint_minutes"),
}


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The end of a run.

    Attributes:
        workdir: The run's directory.
        step: The number of steps taken, earlier starts included.
        evaluation: The evaluation of the test images after the last epoch; None if the
            run was stopped.
        stopped_by: The signal that stopped the run, or None.
        why_early: Why the run ended before its last epoch; None if it did not.
    """

    workdir: pathlib.Path
    step: int
    evaluation: Evaluation | None
    stopped_by: int | None
    why_early: str | None = None


def fit(
    config: Config,
    *,
    workdir: pathlib.Path,
    resume: bool,
    devices: Any = None,
    wandb: bool = False,
) -> FitResult:
    """Trains, evaluates after every epoch, and keeps checkpoints.

    Args:
        config: The run's configuration.
        workdir: The run's directory.
        resume: Whether a run in `workdir` is resumed, if there is one.
        devices: The devices to run on; None means all.
        wandb: Whether metrics also go to Weights & Biases.

    Raises:
        UsageError: The input is bad, a loss is not finite, or the disk is full. The
            last good checkpoint is left.
    """
    if wandb:
        import_wandb()  # before anything is read
    config = resolve_teacher(config)
    # A plan that no network takes is said before data are read, which may take long.
    with user_input():
        check_model(config.model)
    directory = RunDirectory(workdir, config, resume=resume)
    is_new = not directory.has_checkpoints
    if is_new:
        verify_initial(config)
    data = load_configured(config.data)
    _check_agreement(config, data)
    if is_new:
        data = check_initial(config, data)
    elif config.init is not None and not config.new_head:
        data = _with_classes_of_run(data, directory.checkpoints)
    trainer = Trainer(config, data, devices)
    warn_of_unreached(config)
    warn_of_learning_rate(config)
    whose = "the checkpoint" if config.init else "the configuration"
    warn_of_normalisation(data, config.data.mean, config.data.std, whose=whose)
    template = trainer.abstract_state()
    directory.lock()
    checkpoints = Checkpoints(directory.checkpoints)
    try:
        state, step, seconds, best = _restore(
            trainer, template, checkpoints, resume=resume
        )
        directory.open(step, learning_rate=trainer.learning_rate, wandb=wandb)
        with StopSignal() as stop, TrainingClock(seconds) as clock:
            return _Run(
                trainer, state, step, directory, checkpoints, stop, clock, best
            ).finish()
    except jax.errors.JaxRuntimeError as error:
        if is_lost(error):
            checkpoints.abandon()
        raise
    finally:
        try:
            # After an error, the last good checkpoint may still be being written. Until
            # it is complete, no other run may have the directory.
            checkpoints.wait()
        finally:
            directory.close()


def _check_agreement(config: Config, data: ImageSet) -> None:
    """Raises UsageError where processes have different runs, which would hang."""
    # Paths may differ between machines; the data may not.
    values = {
        "configuration": without_places(config_to_json(config), has_names=False),
        "data": data.describe(),
    }
    for name, value in values.items():
        text = json.dumps(value, sort_keys=True).encode()
        other = differing_process(hashlib.sha256(text).digest())
        if other is not None:
            raise UsageError(
                f"the {name} of process {other} is not that of process 0; all "
                f"must run the same command on the same data."
            )


def _with_classes_of_run(data: ImageSet, checkpoints: pathlib.Path) -> ImageSet:
    """Returns data with the classes that the run began with, those of its network."""
    for step in reversed(latest_steps(checkpoints)):
        # A damaged checkpoint is reported when arrays are restored.
        with contextlib.suppress(OSError, ValueError):
            path = checkpoint_path(checkpoints, step)
            return named_as(data, load_metadata(path).class_names)
    return data


def _restore(
    trainer: Trainer, template: TrainState, checkpoints: Checkpoints, *, resume: bool
) -> tuple[TrainState, int, float, Best]:
    step, seconds, best = 0, 0.0, Best()
    restored = checkpoints.restore() if resume else None
    if restored is not None:
        path, arrays = restored
        info = load_metadata(path).info
        _check_same_sources(path, info, trainer)
        trainer.take_reasons(path)
        state = trainer.restore(template, arrays)
        step = int(arrays["training"]["step"])
        # Checkpoints of older versions have no seconds; reports then leave them out.
        seconds, best = info.get("train_seconds", 0.0), Best.of(info)
    else:
        state = trainer.init_state()
    if jax.process_count() > 1:
        first = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if first != step:
            raise UsageError(
                f"process {jax.process_index()} finds step {step}, process 0 step "
                f"{first}; the run's directory must be one that all share."
            )
    if restored is not None and jax.process_index() == 0:
        tqdm.write(f"resuming from {path}, step {step} of {trainer.steps}")
    return state, step, seconds, best


def _check_same_sources(
    path: pathlib.Path, info: Mapping[str, Any], trainer: Trainer
) -> None:
    config = info.get("config")
    if isinstance(config, dict):
        # That of the directory may be another's: a checkpoint can be copied into it.
        there = fill_defaults(config, config_to_json(Config()))
        here = config_to_json(trainer.config)
        differing = differing_fields(_what_is_learnt(there), _what_is_learnt(here))
        if differing:
            raise UsageError(
                f"{path} is of a run with another config; nothing was changed. Move "
                f"it elsewhere, or undo:\n  " + "\n  ".join(differing)
            )
    differing = differing_fields(info.get("data"), trainer.data.describe())
    if differing:
        raise UsageError(
            f"{path} was trained on other data; nothing was changed: "
            f"{'; '.join(differing)}."
        )
    if info.get("teacher_sha256") != trainer.teacher_sha256:
        raise UsageError(
            f"{path} had another teacher than {trainer.config.teacher} holds now; "
            f"nothing was changed."
        )


def _what_is_learnt(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a JSON config that all checkpoints of a run share."""
    # The first process sees to the names of data; their places differ by machine.
    has_names = jax.process_index() == 0
    placeless = without_places(config, has_names=has_names)
    data = placeless["data"]
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name != "memory_share"}
    fields = {**placeless, "data": data}
    return {name: value for name, value in fields.items() if name not in _CHANGEABLE}


@dataclasses.dataclass
class _Run:
    """A run in progress: its state, its directory, its clock and its stop signal."""

    trainer: Trainer
    state: TrainState
    step: int
    directory: RunDirectory
    checkpoints: Checkpoints
    stop: StopSignal
    clock: TrainingClock
    best: Best
    last_save: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        trainer = self.trainer
        batch_size = trainer.config.batch_size
        self.pace = Pace(self.clock, steps=trainer.steps, batch_size=batch_size)

    def finish(self) -> FitResult:
        """Trains the epochs that are left, unless a signal stops the run."""
        trainer, config = self.trainer, self.trainer.config
        _announce(trainer, self.state)
        if self.step == 0:
            self.directory.show_images(0, "train/images", first_images(trainer))
        evaluation: Evaluation | None = None
        why_early = self._why_early()
        if self.step < trainer.steps and why_early is None:
            say("compiling the first step")
        with progress_bar(trainer.steps, self.step, config.batch_size) as bar:
            for epoch in range(self.step // trainer.steps_per_epoch, config.epochs):
                if why_early is not None:
                    break
                bar.set_description(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
                meter = Meter(
                    self.directory, bar, config, self.step, has_gates=trainer.has_gates
                )
                stopped_by = self._train_epoch(epoch, meter, bar)
                if self.step == (epoch + 1) * trainer.steps_per_epoch:
                    evaluation = self._end_epoch(epoch, meter, bar)
                    why_early = self._why_early()
                    # A signal that came during the evaluation is seen here. With
                    # several processes, a later signal is seen after the next call.
                    stopped_by = stopped_by or self.stop.received
                is_ended = self.step == trainer.steps or why_early is not None
                if stopped_by is not None and not is_ended:
                    self.checkpoints.wait()
                    return FitResult(self.directory.path, self.step, None, stopped_by)
        self.checkpoints.wait()
        if evaluation is None:  # resumed after its end
            evaluation = trainer.evaluate(self.state)
        return FitResult(self.directory.path, self.step, evaluation, None, why_early)

    def _why_early(self) -> str | None:
        """Returns why the run ends before its last epoch, None if it goes on."""
        config = self.trainer.config
        epoch, inside = divmod(self.step, self.trainer.steps_per_epoch)
        is_over = self.best.is_over(epoch, config.early_stopping)
        if inside or epoch >= config.epochs or not is_over:
            return None
        return self.best.why_over(epoch, config.epochs)

    def _train_epoch(self, epoch: int, meter: Meter, bar: tqdm) -> int | None:
        """Takes the remaining steps of an epoch; returns the signal that stopped it."""
        trainer, end = self.trainer, (epoch + 1) * self.trainer.steps_per_epoch
        first_step = self.step - epoch * trainer.steps_per_epoch
        stopped_by = None
        self.clock.start()
        for inputs in trainer.inputs(epoch, first_step):
            with self.pace.call(bar):
                self.state, totals = trainer.train_call(self.state, inputs)
            before, self.step = self.step, self.step + inputs[2].shape[1]
            # The meter reads one call late: the devices never wait for the host.
            meter.after_call(self.step, totals)
            self.pace.after_call(self.step)
            stopped_by = self.stop.after_call()
            if self.step < end and (
                stopped_by is not None
                or _is_save_due(trainer.config, before, self.step, self.last_save)
            ):
                meter.flush()
                self._save(None)
                if stopped_by is not None:
                    return stopped_by
        meter.flush()
        self.clock.stop()
        return stopped_by

    def _end_epoch(self, epoch: int, meter: Meter, bar: tqdm) -> Evaluation:
        """Logs, evaluates and saves after an epoch's last step."""
        words = meter.log_epoch(epoch, self.clock.seconds)
        with refreshed(bar):
            validation = self.trainer.validate(self.state)
            evaluation = self.trainer.evaluate(self.state)
        if validation is not None:
            self.best = self.best.after(epoch + 1, validation.top1)
        histograms = gate_histograms(evaluation, self.state.result)
        self.directory.show_histograms(self.step, histograms)
        for kind, found in (("validation", validation), ("test", evaluation)):
            if found is not None:
                metrics = {"epoch": epoch + 1, **found.metrics()}
                self.directory.log(self.step, kind, metrics)
                words += (
                    f"  {kind} loss {found.loss:.4f}  {kind} top-1 {found.top1:.2%}"
                )
        if jax.process_index() == 0:
            bar.write(f"epoch {epoch + 1:3d}  {words}", file=sys.stdout)
        self._save(evaluation, validation)
        return evaluation

    def _save(
        self, evaluation: Evaluation | None, validation: Evaluation | None = None
    ) -> None:
        trainer, state = self.trainer, self.state
        metadata = make_metadata(
            trainer,
            evaluation,
            validation=validation,
            best=self.best,
            train_seconds=self.clock.seconds,
        )
        training = training_to_dict(state)
        self.checkpoints.save(
            self.step, trainer.model, state.result, training, metadata
        )
        self.last_save = time.monotonic()


def _announce(trainer: Trainer, state: TrainState) -> None:
    """Prints, on the first process, what will be trained."""
    if jax.process_index() != 0:
        return
    tqdm.write(describe_run(trainer), file=sys.stderr)
    if trainer.has_gates:
        shape = trainer.preprocessing.image_shape
        tqdm.write(f"{count_cost(trainer.model, shape)}\n")
    if trainer.update.trained is not None:
        tqdm.write(describe_trained(state.params, trainer.update.trained))
    for line in _describe_held_out(trainer):
        tqdm.write(line)
    taken = trainer.steps_per_epoch * trainer.config.batch_size
    dropped = len(trainer.data.train or ()) - taken
    if dropped:
        tqdm.write(f"the last {dropped} images of each epoch's shuffle are left out")


def _describe_held_out(trainer: Trainer) -> list[str]:
    """Returns what is held out of the training images, a line a split."""
    data, lines = trainer.data, []
    if "test" in data.held_out:
        lines.append(f"{len(data.test):,} images are held out as test images")
    if data.validation is not None:
        lines.append(
            f"{len(data.validation):,} images are held out for validation, which "
            f"chooses the best checkpoint"
        )
    return lines


def _is_save_due(config: Config, before: int, step: int, last_save: float) -> bool:
    every = config.checkpoint_steps
    if every is not None and step // every > before // every:
        return True
    is_late = (time.monotonic() - last_save) / 60 >= config.checkpoint_minutes
    if jax.process_count() > 1:
        # All processes write, so all use the clock of the first. Since the devices wait
        # for its answer, they ask only as often as metrics are logged.
        if step // config.log_steps == before // config.log_steps:
            return False
        is_late = bool(multihost_utils.broadcast_one_to_all(np.int32(is_late)))
    return is_late


def exit_code(result: FitResult) -> int:
    """Returns 130 after Ctrl-C, and 0 after SIGTERM, with which clusters stop a run."""
    return 130 if result.stopped_by == signal.SIGINT else 0


def summary(result: FitResult) -> str:
    """Returns a text that says how a run ended and where its files are."""
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        return (
            f"stopped by {name} and saved at step {result.step}; the same command with "
            f"--resume goes on."
        )
    evaluation = result.evaluation
    if evaluation is None:
        raise ValueError("a run that was not stopped has an evaluation.")
    options = ["--flip-test"] if evaluation.flip_test else []
    top5 = f", top-5 {evaluation.top5:.2%}" if evaluation.has_top5 else ""
    early = "" if result.why_early is None else f"{result.why_early}\n"
    return (
        f"{early}last epoch   test top-1 {evaluation.top1:.2%}{top5}, loss "
        f"{evaluation.loss:.4f} on {evaluation.num_examples:,} images\n"
        f"checkpoints  {result.workdir}/checkpoints\n"
        f"{_best(result.workdir / 'checkpoints', evaluation.top1)}"
        f"metrics      {result.workdir}/metrics.jsonl, {result.workdir}/tensorboard\n"
        f"evaluate     {shell_command('evaluate', result.workdir, *options)}"
    )


def result_to_json(result: FitResult) -> dict[str, Any]:
    """Returns how a run ended, and where its files are, as JSON has it."""
    evaluation, checkpoints = result.evaluation, result.workdir / "checkpoints"
    step = best_step(checkpoints)
    return {
        "workdir": result.workdir,
        "step": result.step,
        "stopped_by": result.stopped_by,
        "last": evaluation and json.loads(evaluation.to_json()),
        "best_checkpoint": None if step is None else checkpoint_path(checkpoints, step),
    }


def _best(checkpoints: pathlib.Path, last_top1: float) -> str:
    """Returns a line that names the best checkpoint, "" where none was evaluated."""
    step = best_step(checkpoints)
    if step is None:
        return ""
    path, tie = checkpoint_path(checkpoints, step), ""
    info = load_metadata(path).info
    if validation := info.get("validation"):
        return (
            f"best         {path.name}, by validation top-1 {validation['top1']:.2%} "
            f"(test top-1 {info['evaluation']['top1']:.2%})\n"
        )
    is_last = step == latest_steps(checkpoints)[-1]
    top1 = info["evaluation"]["top1"]
    if not is_last and top1 == last_top1:
        tie = ", the first of those with this accuracy"
    return f"best         {path.name}, test top-1 {top1:.2%}{tie}\n"
