"""A run on its devices: its compiled calls, their inputs and the first state."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from inertia_jax.metadata import Metadata
from inertia_jax.models.create import drawn_variables, trace_variables
from train.config import Config
from train.config_file import config_to_json
from train.data import ImageSet, Split
from train.data.augment import Augmentation
from train.data.feed import choose_steps_per_call, epoch_order, make_feed
from train.errors import user_input
from train.evaluate.evaluation import Evaluation, make_evaluator
from train.fit.best import Best
from train.fit.checks import check_float64, check_gates, check_trainable
from train.fit.initial import read_initial
from train.fit.teacher import load_teacher
from train.keys import run_keys
from train.machine.parallel import AXIS, Parallel
from train.machine.processes import say
from train.networks import make_model, make_preprocessing, open_description
from train.own_network import OwnNetwork
from train.run.checkpoints import find_checkpoint
from train.step.distill import Distillation
from train.step.objective import Objective
from train.step.optimizer import (
    make_optimizer,
    make_schedule,
    scale_learning_rate,
)
from train.step.state import TrainState, Update, init_state, restore_state
from train.step.train_step import TrainStep
from train.step.trainable import trained_paths


class Trainer:
    """A configured run on its devices: its compiled calls and their inputs.

    Attributes:
        parallel: The devices, and the way to run on them.
        preprocessing: The preparation of an image for evaluation.
        update: The change of the state by a step's gradient.
        augmentation: The transformation of stored images into the network's input.
        feed: The way of the training images to the devices.
        steps_per_epoch: The number of whole batches of the training images.
        steps_per_call: The number of steps of a compiled call.
        teacher_sha256: The hash of the teacher's variables; None without a teacher.
        teacher_variables: The teacher's variables on the devices, or None.
    """

    def __init__(self, config: Config, data: ImageSet, devices: Any = None) -> None:
        """Puts the data on the devices and prepares the calls.

        Args:
            config: The run's configuration.
            data: The images that `config.data.source` names.
            devices: The devices to run on; None means all.

        Raises:
            UsageError: A field does not suit the data, the model or the devices.
        """
        self.config = config
        self.data = data
        self.parallel = Parallel(config.parallel, tuple(devices or jax.devices()))
        train = check_trainable(config, data, self.parallel.num_devices)
        check_float64(config)
        with user_input():
            self.preprocessing = make_preprocessing(config.data, data.image_shape)
            self.model = make_model(
                config.model,
                num_classes=data.num_classes,
                image_shape=self.preprocessing.image_shape,
            )
        check_gates(config, self.model.plan.inertial, self.parallel.num_devices)
        self.steps_per_epoch = len(train) // config.batch_size
        self.update = self._make_update()
        teacher = load_teacher(config, self.preprocessing, data)
        self.teacher_sha256 = teacher.sha256 if teacher else None
        # As an argument of every call they are no constants of the program.
        self.teacher_variables = (
            self.parallel.replicate(teacher.variables) if teacher else None
        )
        self.augmentation = Augmentation(
            self.preprocessing, config.data, jnp.dtype(self.model.dtype)
        )
        share = config.data.memory_share
        self.feed = make_feed(train, self.parallel, memory_share=share)
        self.steps_per_call = choose_steps_per_call(
            self.feed,
            asked=config.steps_per_call,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=config.batch_size,
        )
        step = self._make_step(teacher.distillation if teacher else None)
        spread = (False, *self.feed.spread, True, False)
        self._call: Any = self.parallel.wrap(step.call, spread, donate=True)
        rows = np.arange(config.batch_size, dtype=np.int32)
        self._positions = self.parallel.spread(
            rows.reshape(self.parallel.num_devices, -1)
        )
        self._evaluate = self._make_evaluator(data.test)
        self._validate = None
        if data.validation is not None:
            self._validate = self._make_evaluator(data.validation)

    def _make_evaluator(self, split: Split) -> Callable[[Any], Evaluation]:
        config = self.config
        share = config.data.memory_share
        return make_evaluator(
            self.model,
            self.augmentation,
            make_feed(split, self.parallel, memory_share=share),
            self.parallel,
            batch_size=config.eval_batch_size,
            class_names=self.data.class_names,
            flip_test=config.flip_test,
        )

    def _make_update(self) -> Update:
        config, trained = self.config, None
        if config.train_only or config.freeze:
            with user_input():
                params = self._draw.out_info["params"]
            trained = trained_paths(
                params, train_only=config.train_only, freeze=config.freeze
            )
        with user_input():
            tx = make_optimizer(
                scale_learning_rate(config.optimizer, batch_size=config.batch_size),
                steps_per_epoch=self.steps_per_epoch,
                epochs=config.epochs,
            )
        return Update(tx, trained=trained, ema_decay=config.optimizer.ema_decay)

    def _make_step(self, distillation: Distillation | None) -> TrainStep:
        config = self.config
        is_synchronised = config.sync_batch_norm and self.parallel.num_devices > 1
        return TrainStep(
            self.model.clone(axis_name=AXIS if is_synchronised else None),
            self.update,
            self.augmentation,
            Objective(
                label_smoothing=config.optimizer.label_smoothing,
                gate_budget=config.gate_budget,
                gate_penalty=config.gate_penalty,
                distillation=distillation,
            ),
            alternating_flip=config.data.flip
            and config.data.flip_mode == "alternating",
            steps_per_epoch=self.steps_per_epoch,
            seed=config.seed,
        )

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def has_gates(self) -> bool:
        """Whether the network has inertial layers."""
        return bool(self.model.plan.inertial)

    @functools.cached_property
    def learning_rates(self) -> Float[np.ndarray, "steps"]:
        """The learning rate of each step of the run, computed once on the host."""
        schedule = make_schedule(
            scale_learning_rate(
                self.config.optimizer, batch_size=self.config.batch_size
            ),
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.config.epochs,
        )
        # Beside an accelerator's steps, none of which would be waited for.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            rates = jax.jit(jax.vmap(schedule))(jnp.arange(self.steps))
            return np.asarray(rates)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate with which a step, counted from 1, was taken."""
        rates = self.learning_rates
        return float(rates[min(max(step, 1), len(rates)) - 1])

    def abstract_state(self) -> TrainState:
        """Returns the shapes and types of a state; nothing is drawn or compiled.

        Raises:
            UsageError: The model cannot take the images.
        """
        with user_input():
            variables = self._draw.out_info
        return jax.eval_shape(self._first_state, variables)

    def init_state(self) -> TrainState:
        """Puts the first state on the devices, as `config.init` has it or drawn.

        The files of `config.init` are not hashed here: `fit` has done it before it read
        the data, and a second time would double the start. Whoever makes a trainer
        without `fit` calls `verify_initial` and `check_initial` first.

        Raises:
            UsageError: As `read_initial`, or the model cannot take the images.
        """
        config = self.config
        name = config.model.factory or config.model.name
        say(f"starting {name} from {config.init or 'random weights'}")
        key = run_keys(config.seed).init
        with user_input():
            draw = self._draw
        if config.init is None:
            variables = drawn_variables(draw, key)
        else:
            variables = read_initial(
                config, self.data, self.model, key, expected=draw.out_info
            )
            self.take_reasons(find_checkpoint(config.init))
        state = self._first_state(variables)
        # The state is in its final place before the first step, which compiles twice
        # otherwise.
        return self.parallel.replicate(jax.device_get(state))

    @functools.cached_property
    def _draw(self) -> jax.stages.Traced:
        """The program that draws the first variables, traced once."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return trace_variables(self.model, key, self.preprocessing.image_shape)

    def _first_state(self, variables: Any) -> TrainState:
        return init_state(self.model, self.update, variables)

    def take_reasons(self, path: pathlib.Path) -> None:
        """Takes from a checkpoint why layers of the user's own network stayed.

        The configuration, which makes the network, does not have the reasons.
        """
        if isinstance(self.model, OwnNetwork):
            there, _ = open_description(path, factory=self.model.factory)
            self.model = self.model.clone(kept=there.kept)

    def restore(self, template: TrainState, arrays: dict[str, Any]) -> TrainState:
        """Puts a checkpoint's arrays on the devices."""
        state = restore_state(template, arrays)
        return self.parallel.replicate(state.widened(self.model))

    def train_call(self, state: TrainState, inputs: Any) -> tuple[TrainState, Any]:
        """Takes the steps of one call and returns (state, totals); consumes `state`."""
        return self._call(state, *inputs, self._positions, self.teacher_variables)

    def lower(self, state: Any) -> jax.stages.Lowered:
        """Returns the program of a call of full length before its compilation.

        Args:
            state: The state, or its shapes.
        """
        with contextlib.closing(self.inputs(0, 0)) as calls:
            inputs = next(calls)
        lowered: jax.stages.Lowered = self._call.lower(
            state, *inputs, self._positions, self.teacher_variables
        )
        return lowered

    def inputs(self, epoch: int, first_step: int) -> Generator[Any, None, None]:
        """Yields the inputs of an epoch's calls, from its step `first_step`."""
        order = epoch_order(
            self.config.seed,
            epoch,
            num_examples=len(self.feed.split),
            batch_size=self.config.batch_size,
        )
        return self.feed.calls(order[first_step:], self.steps_per_call)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Evaluates the test images."""
        return self._evaluate(state.result)

    def validate(self, state: TrainState) -> Evaluation | None:
        """Evaluates the validation images; None where none are held out."""
        return None if self._validate is None else self._validate(state.result)


def make_metadata(
    trainer: Trainer,
    evaluation: Evaluation | None,
    *,
    validation: Evaluation | None = None,
    best: Best | None = None,
    train_seconds: float,
) -> Metadata:
    """Returns the metadata of a checkpoint of the run.

    Args:
        trainer: The run on its devices.
        evaluation: The evaluation of the test images; None inside an epoch.
        validation: That of the validation images; None also where there are none.
        best: The best epoch so far; None where there are no validation images.
        train_seconds: The seconds of training so far.
    """
    teacher = trainer.teacher_sha256
    return Metadata(
        preprocessing=trainer.preprocessing,
        class_names=trainer.data.class_names,
        info={
            "config": config_to_json(trainer.config),
            "data": trainer.data.describe(),
            "evaluation": evaluation.metrics() if evaluation else None,
            **({"validation": validation.metrics()} if validation else {}),
            **({"best": dataclasses.asdict(best)} if best and best.epoch else {}),
            "train_seconds": train_seconds,
            **({"teacher_sha256": teacher} if teacher else {}),
        },
    )
