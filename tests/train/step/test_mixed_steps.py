"""Steps on mixed images: their labels, and the same on any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    IMAGES,
    LABELS,
    SYNTHETIC,
    Small,
    make_config,
    relative,
    synthetic_set,
    train_steps,
)

import inertia_jax as ij
from inertia_jax.metadata import Preprocessing
from train.config import Data, Optimizer
from train.data.augment import Augmentation, example_keys
from train.keys import run_keys
from train.machine.parallel import AXIS, Parallel
from train.step.objective import Objective
from train.step.optimizer import make_optimizer
from train.step.state import Update, init_state
from train.step.train_step import TrainStep, previous_examples


def test_the_example_before_is_that_of_the_whole_batch():
    batch = np.arange(24).reshape(8, 3)
    for devices in (1, 2, 8):
        split = batch.reshape(devices, -1)
        found = jax.pmap(previous_examples, AXIS, devices=jax.devices()[:devices])(
            split
        )
        np.testing.assert_array_equal(np.ravel(found), np.roll(batch.ravel(), 1))


@pytest.mark.slow
def test_the_loss_is_that_of_both_labels_by_their_weights():
    preprocessing = Preprocessing((6, 6, 2), (0.5,) * 2, (0.25,) * 2)
    data = Data(crop_padding=0, flip=False, mixup=0.4, cutmix=1.0)
    augmentation = Augmentation(preprocessing, data, jnp.dtype("float32"))
    model, places = Small(), np.arange(16, dtype=np.int32)
    tx = make_optimizer(Optimizer(), steps_per_epoch=1, epochs=1)
    update = Update(tx)
    step = TrainStep(
        *(model, update, augmentation, Objective(label_smoothing=0.1)),
        steps_per_epoch=1,
        seed=1,
    )
    state = init_state(
        model, update, ij.init_variables(model, jax.random.key(0), (6, 6, 2))
    )
    call = Parallel("pmap", (jax.devices()[0],)).wrap(
        step.call, (False, *[True] * 4, False)
    )
    _, totals = call(
        state, IMAGES[None], LABELS[None], places[None, None], places[None], None
    )

    key, _ = jax.random.split(jax.random.fold_in(run_keys(1).steps, 0))
    keys = example_keys(key, jnp.asarray(places))
    plain = augmentation.for_training(jnp.asarray(IMAGES), keys)
    batch, weights = augmentation.mixed(plain, jnp.roll(plain, 1, axis=0), keys)
    logits, _ = model.apply(
        state.variables, batch, train=True, mutable=["batch_stats", "intermediates"]
    )
    one_hot = np.eye(10)[LABELS]
    w = np.asarray(weights)[:, None]
    targets = w * one_hot + (1 - w) * np.roll(one_hot, 1, axis=0)
    targets = 0.9 * targets + 0.01
    losses = -(targets * np.asarray(jax.nn.log_softmax(logits))).sum(1)
    np.testing.assert_allclose(totals.loss, losses.sum(), rtol=1e-5)
    right = np.argmax(logits, 1) == np.argmax(targets, 1)
    assert int(totals.correct) == right.sum()


@pytest.mark.slow
def test_devices_do_not_change_what_is_drawn(x64):
    strengths = {"rand_augment": 2, "random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}
    data = dataclasses.replace(SYNTHETIC, **strengths)
    config = dataclasses.replace(make_config(name="lenet", width=0.25), data=data)
    one, two = (train_steps(config, synthetic_set(28), n, 2) for n in (1, 2))
    # Float64 for all but what is drawn.
    assert relative(two, one) < 1e-6
    plain = dataclasses.replace(config, data=SYNTHETIC)
    assert relative(train_steps(plain, synthetic_set(28), 1, 2), one) > 1e-3
