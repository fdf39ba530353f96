"""The training loop: epochs, logging, evaluation, checkpoints, signals."""

import dataclasses
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from inertia_jax import Rate, count_cost, load_checkpoint
from inertia_jax.checkpoint import Metadata, load_metadata
from inertia_jax.models import abstract_variables
from train.augment import Augmentation
from train.checkpoints import Checkpoints
from train.clock import TrainingClock
from train.config import (
    Config,
    config_to_json,
    differing_fields,
    make_model,
    make_preprocessing,
)
from train.data import ImageSet, load_data
from train.errors import UsageError, user_input
from train.evaluate import Evaluation, make_evaluator
from train.feed import epoch_order, make_feed
from train.keys import run_keys
from train.optimizer import make_optimizer, scale_learning_rate
from train.parallel import AXIS, Parallel
from train.processes import is_lost
from train.rundir import RunDirectory
from train.state import TrainState, init_state, restore_state, training_to_dict
from train.step import is_held, make_train_call
from train.teacher import load_teacher, resolve_teacher
from train.trainable import describe_trained, trained_paths

_STEPS_PER_CALL = {"cpu": 1}
_STEPS_PER_CALL_ELSEWHERE = 100
# Of a chunk, on each device; two of them are under way at once.
_STREAMED_BYTES = 2**28


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


class Trainer:
    """A configured run on its devices: the compiled calls and what they take."""

    def __init__(self, config: Config, data: ImageSet, devices: Any = None) -> None:
        """Puts the data on the devices and sets the calls up.

        Args:
            config: Of the run.
            data: What `config.data.source` gives.
            devices: To run on; None means all.

        Raises:
            UsageError: A field that the data, the model or the devices contradict.
        """
        self.config = config
        self.data = data
        self.parallel = Parallel(config.parallel, tuple(devices or jax.devices()))
        num_devices = self.parallel.num_devices
        if data.train is None:
            raise UsageError(f"{data.name} has no training images.")
        if config.batch_size % num_devices:
            raise UsageError(
                f"`batch_size` (={config.batch_size}) must be a multiple of the "
                f"{num_devices} devices."
            )
        if config.batch_size > len(data.train):
            raise UsageError(
                f"`batch_size` (={config.batch_size}) must be at most "
                f"{len(data.train)}, the training images of {data.name}."
            )
        if config.model.dtype == "float64" and jnp.result_type(float) != "float64":
            raise UsageError("`model.dtype` (=float64) needs JAX_ENABLE_X64=1.")
        with user_input():
            self.preprocessing = make_preprocessing(config.data, data.image_shape)
            self.model = make_model(config.model, num_classes=data.num_classes)
        inertial = self.model.plan.inertial
        self.has_gates = bool(inertial)
        if config.gate_budget is not None:
            _check_budget(inertial)
        measured = [s for s in inertial if s.relative or isinstance(s.threshold, Rate)]
        if measured and num_devices > 1 and not config.sync_batch_norm:
            raise UsageError(
                f"`sync_batch_norm` (=False) must be on for {measured[0]}, whose gates "
                f"depend on the whole batch."
            )
        self.trained: frozenset[str] | None = None
        if config.train_only or config.freeze:
            with user_input():
                shape = self.preprocessing.image_shape
                params = abstract_variables(self.model, shape)["params"]
            self.trained = trained_paths(
                params, train_only=config.train_only, freeze=config.freeze
            )
        teacher = load_teacher(config, self.preprocessing, data.num_classes)
        self.teacher_sha256 = teacher.sha256 if teacher else None
        # An argument of every call: within the program it would be so many constants.
        self._teacher = (self.parallel.replicate(teacher.variables),) if teacher else ()
        axis_name = AXIS if config.sync_batch_norm and num_devices > 1 else None
        self._trained_model = self.model.clone(axis_name=axis_name)
        self.steps_per_epoch = len(data.train) // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        with user_input():
            self.tx = make_optimizer(
                scale_learning_rate(config.optimizer, batch_size=config.batch_size),
                steps_per_epoch=self.steps_per_epoch,
                epochs=config.epochs,
            )
        augmentation = Augmentation(
            self.preprocessing,
            crop_padding=config.data.crop_padding,
            flip=config.data.flip,
            resized_crop=config.data.resized_crop,
            dtype=jnp.dtype(config.model.dtype),
            crop_mode=config.data.crop_mode,
        )
        share = config.data.memory_share
        self.feed = make_feed(data.train, self.parallel, memory_share=share)
        test_feed = make_feed(data.test, self.parallel, memory_share=share)
        platform = self.parallel.devices[0].platform
        self.steps_per_call = config.steps_per_call or _STEPS_PER_CALL.get(
            platform, _STEPS_PER_CALL_ELSEWHERE
        )
        if self.feed.resident is None:
            step_bytes = config.batch_size * data.train.images[0].nbytes
            most = max(1, _STREAMED_BYTES * num_devices // step_bytes)
            self.steps_per_call = min(self.steps_per_call, most)
        local = config.batch_size // num_devices
        self._positions = self.parallel.spread(
            np.arange(config.batch_size, dtype=np.int32).reshape(num_devices, local)
        )
        call = make_train_call(
            self._trained_model,
            self.tx,
            augmentation,
            label_smoothing=config.optimizer.label_smoothing,
            alternating_flip=config.data.flip
            and config.data.flip_mode == "alternating",
            ema_decay=config.optimizer.ema_decay,
            gate_budget=config.gate_budget,
            gate_penalty=config.gate_penalty,
            trained=self.trained,
            distillation=teacher.distillation if teacher else None,
            steps_per_epoch=self.steps_per_epoch,
            seed=config.seed,
        )
        spread = (False, *self.feed.spread, True, *(False for _ in self._teacher))
        self._call = self.parallel.wrap(call, spread, donate=True)
        self._evaluate = make_evaluator(
            self.model,
            augmentation,
            test_feed,
            self.parallel,
            batch_size=config.eval_batch_size,
            class_names=data.class_names,
            flip_test=config.flip_test,
        )

    def init_state(self) -> TrainState:
        """Draws the first state and puts it on the devices.

        Raises:
            UsageError: The model cannot take the images.
        """
        with user_input():
            shape = self.preprocessing.image_shape
            key = run_keys(self.config.seed).init
            state = init_state(
                self.model,
                self.tx,
                shape,
                key,
                trained=self.trained,
                averaged=self.config.optimizer.ema_decay > 0,
            )
        # In its final place before the first step, or the step compiles twice.
        return self.parallel.replicate(jax.device_get(state))

    def read_init(self, state: TrainState) -> TrainState:
        """Returns the first state with the variables of `config.init`, if that is set.

        Raises:
            UsageError: No checkpoint is there, or one of another network.
        """
        if self.config.init is None:
            return state
        with user_input():
            model, variables = load_checkpoint(self.config.init)
        if model != self.model:
            raise UsageError(
                f"`init` (={self.config.init}) has another network than `model` and "
                f"the data's {self.data.num_classes} classes say: {model} there, "
                f"{self.model} here."
            )
        return self.parallel.replicate(state.with_variables(variables))

    def restore(self, template: TrainState, arrays: dict[str, Any]) -> TrainState:
        """Puts a checkpoint's arrays on the devices."""
        return self.parallel.replicate(restore_state(template, arrays))

    def train_call(self, state: TrainState, inputs: Any) -> tuple[TrainState, Any]:
        """Takes the steps of one call; `state` is consumed. Returns (state, totals)."""
        return self._call(state, *inputs, self._positions, *self._teacher)

    def inputs(self, epoch: int, first_step: int) -> Iterator[Any]:
        """Yields what the calls of an epoch take, from its step `first_step`."""
        train = self.data.train
        if train is None:
            raise ValueError("there are no training images.")
        order = epoch_order(
            self.config.seed,
            epoch,
            num_examples=len(train),
            batch_size=self.config.batch_size,
        )
        return self.feed.calls(order[first_step:], self.steps_per_call)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Evaluates the test images."""
        return self._evaluate(state.result)


def _check_budget(specs: Sequence[Any]) -> None:
    """Raises UsageError where the budget could not move a gate."""
    if not any(map(is_held, specs)):
        raise UsageError(
            "`gate_budget` needs inertial layers with `gate_gradient` (='ste') in "
            "`model.plan`, their threshold no Rate; nothing else moves gates."
        )


class _StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to act on between two calls."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._calls = 0

    def __enter__(self) -> "_StopSignal":
        self._previous = {}
        # Of several processes all must stop at one step: there JAX's own service
        # agrees on it, and a handler here would displace its handler.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and in_main_thread:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def after_call(self) -> int | None:
        """Returns the signal to stop for after this call, or None."""
        if jax.process_count() > 1:
            # Counted in calls: the service names the next number, and compares.
            self._calls += 1
            reached = multihost_utils.reached_preemption_sync_point(self._calls)
            return signal.SIGTERM if reached else None
        return self.received


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
    trainer = Trainer(config, data, devices)
    state = trainer.init_state()
    directory.lock()
    checkpoints = Checkpoints(directory.checkpoints)
    try:
        state, step, seconds = _restore(trainer, state, checkpoints, resume=resume)
        directory.open(step)
        with _StopSignal() as stop, TrainingClock(seconds) as clock:
            return _run(trainer, state, step, directory, checkpoints, stop, clock)
    except jax.errors.JaxRuntimeError as error:
        if is_lost(error):
            checkpoints.abandon()
        raise
    finally:
        directory.close()
        checkpoints.wait()  # also after an error: the last good one may be under way


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
    stop: _StopSignal,
    clock: TrainingClock,
) -> FitResult:
    config, spe = trainer.config, trainer.steps_per_epoch
    if trainer.has_gates and jax.process_index() == 0:
        shape = trainer.preprocessing.image_shape
        tqdm.write(f"{count_cost(trainer.model, shape)}\n")
    if trainer.trained is not None and jax.process_index() == 0:
        tqdm.write(describe_trained(state.params, trainer.trained))
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

    bar = tqdm(
        total=trainer.steps * config.batch_size,
        initial=step * config.batch_size,
        unit="img",
        unit_scale=True,
        disable=jax.process_index() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
    with bar:
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


def make_metadata(
    trainer: Trainer, evaluation: Evaluation | None, *, train_seconds: float
) -> Metadata:
    """Returns what a checkpoint of the run says of itself."""
    teacher = trainer.teacher_sha256
    return Metadata(
        preprocessing=trainer.preprocessing,
        class_names=trainer.data.class_names,
        info={
            "config": config_to_json(trainer.config),
            "data": trainer.data.describe(),
            "evaluation": evaluation.metrics() if evaluation else None,
            "train_seconds": train_seconds,
            **({"teacher_sha256": teacher} if teacher else {}),
        },
    )


class Meter:
    """Reads an epoch's totals one call late, logs them, and stops on a bad loss."""

    def __init__(
        self,
        directory: RunDirectory,
        bar: tqdm,
        config: Config,
        step: int,
        *,
        has_gates: bool,
    ) -> None:
        """Begins an epoch, or what is left of it after `step`."""
        self._has_gates = has_gates
        self._directory = directory
        self._bar = bar
        self._config = config
        self._pending: tuple[int, Any] | None = None
        self._first = self._logged = self._step = step
        self._start = self._since = time.perf_counter()
        self._last: dict[str, float] = {}

    def after_call(self, step: int, totals: Any) -> None:
        """Reports the call before, and notes this one."""
        self.flush()
        self._pending = (step, totals)

    def flush(self) -> None:
        """Waits for the last call, and reports it."""
        if self._pending is None:
            return
        (step, totals), self._pending = self._pending, None
        totals = jax.device_get(totals)
        if totals.bad_step >= 0:
            raise UsageError(
                f"loss or gradient is not finite at step {int(totals.bad_step)}; "
                f"stopped. The last good checkpoint is left in "
                f"{self._directory.checkpoints}. A lower learning rate or a warm-up "
                f"may help."
            )
        batch_size = self._config.batch_size
        self._last = {
            "loss": float(totals.loss / totals.count),
            "accuracy": float(totals.correct / totals.count),
        }
        if self._has_gates:
            self._last["gate_rate"] = float(totals.gate_rate / totals.count)
        self._bar.set_postfix(
            loss=f"{self._last['loss']:.4f}",
            acc=f"{self._last['accuracy']:.2%}",
            refresh=False,
        )
        self._bar.update((step - self._step) * batch_size)
        if step // self._config.log_steps > self._step // self._config.log_steps:
            now = time.perf_counter()
            rate = (step - self._logged) * batch_size / (now - self._since)
            self._directory.log(step, "train", {**self._last, "images_per_s": rate})
            self._since, self._logged = now, step
        self._step = step

    def log_epoch(self, epoch: int, train_seconds: float) -> str:
        """Logs the epoch that has ended, and returns it in words.

        Args:
            epoch: From 0.
            train_seconds: Of training, since the start of the run.
        """
        images = (self._step - self._first) * self._config.batch_size
        rate = images / (time.perf_counter() - self._start)
        metrics = {"epoch": epoch + 1, **self._last, "images_per_s": rate}
        metrics["train_seconds"] = train_seconds
        self._directory.log(self._step, "epoch", metrics)
        loss, accuracy = self._last["loss"], self._last["accuracy"]
        words = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {rate:.0f} images/s"
        if self._has_gates:
            words += f"  gates {self._last['gate_rate']:.3f}"
        return words
