"""A run on its devices: its compiled calls, what they take and what they begin with."""

import pathlib
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inertia_jax import Rate, load_checkpoint
from inertia_jax.metadata import Metadata, load_metadata
from inertia_jax.models import abstract_variables
from train.augment import Augmentation
from train.checkpoints import find_checkpoint
from train.config import Config
from train.config_file import config_to_json
from train.data import ImageSet, Split, warn_of_other_names
from train.errors import UsageError, user_input
from train.evaluate import Evaluation, make_evaluator
from train.feed import choose_steps_per_call, epoch_order, make_feed
from train.keys import run_keys
from train.networks import make_model, make_preprocessing
from train.optimizer import make_optimizer, scale_learning_rate
from train.parallel import AXIS, Parallel
from train.processes import differing_process
from train.state import TrainState, Update, init_state, restore_state
from train.step import Objective, TrainStep, is_held
from train.teacher import hash_variables, load_teacher
from train.trainable import trained_paths


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
        train = check_trainable(config, data, num_devices)
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
        self.steps_per_epoch = len(train) // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        with user_input():
            tx = make_optimizer(
                scale_learning_rate(config.optimizer, batch_size=config.batch_size),
                steps_per_epoch=self.steps_per_epoch,
                epochs=config.epochs,
            )
        self.update = Update(tx, self.trained, config.optimizer.ema_decay)
        self.augmentation = Augmentation.of(
            config.data, self.preprocessing, config.model.dtype
        )
        share = config.data.memory_share
        self.feed = make_feed(train, self.parallel, memory_share=share)
        test_feed = make_feed(data.test, self.parallel, memory_share=share)
        self.steps_per_call = choose_steps_per_call(
            self.feed,
            asked=config.steps_per_call,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=config.batch_size,
        )
        local = config.batch_size // num_devices
        self._positions = self.parallel.spread(
            np.arange(config.batch_size, dtype=np.int32).reshape(num_devices, local)
        )
        step = TrainStep(
            self._trained_model,
            self.update,
            self.augmentation,
            Objective(
                label_smoothing=config.optimizer.label_smoothing,
                gate_budget=config.gate_budget,
                gate_penalty=config.gate_penalty,
                distillation=teacher.distillation if teacher else None,
            ),
            alternating_flip=config.data.flip
            and config.data.flip_mode == "alternating",
            steps_per_epoch=self.steps_per_epoch,
            seed=config.seed,
        )
        spread = (False, *self.feed.spread, True, *(False for _ in self._teacher))
        self._call = self.parallel.wrap(step.call, spread, donate=True)
        self._evaluate = make_evaluator(
            self.model,
            self.augmentation,
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
            state = init_state(self.model, self.update, shape, key)
        # In its final place before the first step, or the step compiles twice.
        return self.parallel.replicate(jax.device_get(state))

    def read_init(self, state: TrainState) -> TrainState:
        """Returns the first state with the variables of `config.init`, if that is set.

        Raises:
            UsageError: No checkpoint is there, or one of another network, or one that
                was trained with another normalisation.
        """
        if self.config.init is None:
            return state
        path = find_checkpoint(self.config.init)
        with user_input():
            model, variables = load_checkpoint(path)
            metadata = load_metadata(path)
        if jax.process_count() > 1:
            _check_same_everywhere(path, variables)
        warn_of_other_names(self.data, metadata.class_names)
        own, theirs = self.preprocessing, metadata.preprocessing
        if theirs is not None and (own.mean, own.std) != (theirs.mean, theirs.std):
            raise UsageError(
                f"`init` (={self.config.init}) was trained with `mean` {theirs.mean} "
                f"and `std` {theirs.std}; the run has {own.mean} and {own.std}."
            )
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

    def inputs(self, epoch: int, first_step: int) -> Generator[Any, None, None]:
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


def check_trainable(config: Config, data: ImageSet, num_devices: int) -> Split:
    """Returns the training images.

    Raises:
        UsageError: There are none, or batches of them that the devices cannot share.
    """
    if data.train is None:
        raise UsageError(f"{data.name} has no training images.")
    if config.batch_size % num_devices:
        raise UsageError(
            f"`batch_size` (={config.batch_size}) must be a multiple of the "
            f"{num_devices} devices."
        )
    if config.batch_size > len(data.train):
        raise UsageError(
            f"`batch_size` (={config.batch_size}) must be at most {len(data.train)}, "
            f"the training images of {data.name}."
        )
    return data.train


def _check_same_everywhere(path: pathlib.Path, variables: dict[str, Any]) -> None:
    """Raises UsageError where processes read other numbers than the first."""
    other = differing_process(bytes.fromhex(hash_variables(variables)))
    if other is not None:
        raise UsageError(
            f"process {other} reads other variables for `init` than process 0, "
            f"which has {path}; name one checkpoint."
        )


def _check_budget(specs: Sequence[Any]) -> None:
    """Raises UsageError where the budget could not move a gate."""
    if not any(map(is_held, specs)):
        raise UsageError(
            "`gate_budget` needs inertial layers with `gate_gradient` (='ste') in "
            "`model.plan`, their threshold no Rate; nothing else moves gates."
        )


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
