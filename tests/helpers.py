"""What several files of tests share: images, configurations, networks, runs."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT, shared_file
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from inertia_jax.checkpoint import load_arrays
from inertia_jax.metadata import Preprocessing
from inertia_jax.models.layers import Layers
from train.__main__ import main
from train.config import Config, Data, Model, Optimizer
from train.data.augment import Augmentation
from train.data.sets import ImageSet, Split
from train.fit import stop
from train.fit.trainer import Trainer
from train.machine.parallel import Parallel
from train.run.checkpoints import latest_steps
from train.step.objective import Objective
from train.step.optimizer import make_optimizer
from train.step.state import Update, init_state
from train.step.train_step import TrainStep

# Images that are drawn, and a configuration of them.

SYNTHETIC = Data(source="synthetic", mean=(0.5,) * 3, std=(0.25,) * 3)
GREY = dataclasses.replace(SYNTHETIC, mean=(0.5,), std=(0.25,))
SHAPE = (8, 8, 1)
PREPROCESSING = Preprocessing(SHAPE, (0.5,), (0.25,))


def synthetic_set(size=32, channels=3, num_train=64, num_test=19):
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(256, size=(n, size, size, channels), dtype=np.uint8)
        return Split(images, rng.integers(10, size=n).astype(np.int32))

    names = tuple(map(str, range(10)))
    return ImageSet("synthetic", split(num_train), split(num_test), names)


def save_bright_digits(path, num_train, num_test, size, *, noise=40, step=20):
    """Saves ten classes that differ in brightness, learnt in a few steps.

    Returns the source that names them.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", num_train), ("test", num_test)):
        labels = np.arange(count) % 10
        images = rng.integers(noise, size=(count, size, size, 1))
        images += step * labels[:, None, None, None]
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)
    return f"npz:{path}"


def exact_cifar10(folder):
    """Unpacks the images of CIFAR-10 that the developers have, or skips the test.

    Returns the source that names them.
    """
    name = "cifar10_exact_subset"
    unpack = shared_file("data/unpack.py")
    subprocess.run([sys.executable, unpack, folder, name], check=True)
    return f"npz:{folder / name}.npz"


def make_config(
    dtype="float64", name="resnet18", batch_size=32, width=0.125, **options
):
    return Config(
        batch_size=batch_size,
        epochs=10,
        data=SYNTHETIC,
        model=Model(name=name, width=width, dtype=dtype),
        optimizer=Optimizer(learning_rate=0.05, label_smoothing=0.1),
        **options,
    )


# Steps of a trainer.


def train_steps(config, data, num_devices, steps):
    """Returns flat parameters and statistics after `steps`."""
    trainer = Trainer(config, data, jax.devices()[:num_devices])
    state, step, epoch = trainer.init_state(), 0, 0
    while step < steps:
        for inputs in trainer.inputs(epoch, 0):
            state, _ = trainer.train_call(state, inputs)
            step += inputs[2].shape[1]
        epoch += 1
    assert step == steps
    values, _ = jax.flatten_util.ravel_pytree(jax.device_get(state.variables))
    return np.asarray(values)


def train_streamed(steps):
    """Returns what steps on all devices give; BatchNorm after 20 convolutions."""
    data = dataclasses.replace(SYNTHETIC, memory_share=1e-9)
    config = dataclasses.replace(make_config(parallel="pmap"), data=data)
    return train_steps(config, synthetic_set(16), jax.device_count(), steps)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def abstract_state(trainer):
    """Returns the shapes of a trainer's state."""
    return trainer.abstract_state()


@contextlib.contextmanager
def compilations():
    """Gives a list that has an entry for each program that is compiled meanwhile."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Steps of a small network, without a trainer.

IMAGES = np.random.default_rng(0).integers(256, size=(16, 6, 6, 2), dtype=np.uint8)
LABELS = np.arange(16, dtype=np.int32) % 10
INPUTS = (IMAGES / 255).astype(np.float32)
DECAYING = Optimizer(learning_rate=0.1, weight_decay=0.1, milestones=(1000,))


class Small(nn.Module):
    """An inertial convolution with a threshold, BatchNorm, a linear layer."""

    features: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, *, train=False):
        spec = ij.Inertial(1, 3, threshold=ij.Learned(0.5))
        dtype = jnp.dtype(self.dtype)
        make = Layers(ij.Plan((("conv", spec),)), dtype, None, train)
        x = make.conv(self, "conv", jnp.asarray(x), self.features, 3, padding=1)
        x = nn.relu(
            nn.BatchNorm(use_running_average=not train, dtype=dtype, name="bn")(x)
        )
        x = x.mean((1, 2))
        return nn.Dense(10, dtype=dtype, name="fc")(x)


def take_steps(
    model,
    steps,
    *,
    images=IMAGES,
    labels=LABELS,
    optimizer=DECAYING,
    trained=None,
    ema_decay=0.0,
    teacher=None,
    steps_per_call=1,
    **objective,
):
    """Returns first and last state after calls, each of steps of the whole batch."""
    shape, places = images.shape[1:], np.arange(len(images), dtype=np.int32)
    preprocessing = Preprocessing(shape, (0.0,) * shape[-1], (1.0,) * shape[-1])
    augmentation = Augmentation.plain(preprocessing, getattr(model, "dtype", "float32"))
    tx = make_optimizer(optimizer, steps_per_epoch=1, epochs=1)
    update = Update(tx, trained=trained, ema_decay=ema_decay)
    step = TrainStep(
        model, update, augmentation, Objective(**objective), steps_per_epoch=1, seed=1
    )
    spread = (False, *[True] * 4, False)
    call = Parallel("pmap", (jax.devices()[0],)).wrap(step.call, spread)
    first = last = init_state(
        model, update, ij.init_variables(model, jax.random.key(0), shape)
    )
    for _ in range(steps):
        rows = np.broadcast_to(places, (1, steps_per_call, len(places)))
        last, _ = call(last, images[None], labels[None], rows, places[None], teacher)
    return first, last


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


# The program, and what a run of it leaves.

DIGITS = [
    *("--data.source", "digits", "--data.mean", "0.3", "--data.std", "0.4"),
    *("--data.crop-padding", "0", "--data.no-flip", "--batch-size", "64"),
    *("--log-steps", "10", "--optimizer.learning-rate", "0.05"),
]

# A training of a small network on the images of `save_bright_digits`, in one epoch.
FIT_ONE = [
    *("fit", "--batch-size", "16", "--epochs", "1", "--log-steps", "2"),
    *("--data.mean", "0.5", "--data.std", "0.25", "--data.crop-padding", "1"),
    *("--model.name", "lenet", "--model.width", "0.2"),
]

# A program: becomes Python with these arguments, which hears all signals though tests
# may run where some are ignored.
HEARING = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def fit_digits(workdir, *options):
    """Trains a network until it knows some digits."""
    arguments = ["fit", *DIGITS, *options, "--epochs", "2", "--workdir", str(workdir)]
    assert main(arguments) == 0
    return workdir


def evaluate(checkpoint, tmp_path):
    """Returns what the program finds on a checkpoint's own test images."""
    out = tmp_path / "evaluation.json"
    assert main(["evaluate", str(checkpoint), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def start(arguments, env):
    """Starts Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_at(call, monkeypatch):
    """Has training stop after a call, as if the process were told to end."""
    calls = iter(range(1, 1000))
    found = lambda self: signal.SIGTERM if next(calls) == call else None  # noqa: E731
    monkeypatch.setattr(stop.StopSignal, "after_call", found)


def make_odd(kind, path):
    """Makes what stands where a file should, of any kind."""
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "deeply nested":
        path.write_text("[" * 100_000)
    elif kind == "list":
        path.write_text("[1]")


def last_checkpoint(workdir):
    checkpoints = workdir / "checkpoints"
    return checkpoints / f"step_{latest_steps(checkpoints)[-1]:08d}"


def final_arrays(workdir):
    return load_arrays(last_checkpoint(workdir))


def read_metrics(workdir, *, times=False):
    """Returns a run's lines, without the times, in which no two runs are equal."""
    text = (workdir / "metrics.jsonl").read_text()
    left_out = () if times else ("time", "images_per_s", "train_seconds")
    lines = map(json.loads, text.splitlines())
    return [{k: v for k, v in x.items() if k not in left_out} for x in lines]


def assert_bitwise_equal(a, b):
    def compare(x, y):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()

    jax.tree.map(compare, a, b)


# A program: TFDS's own builder over small CIFAR files that it writes and reads back.
PREPARE = """
import pathlib, sys
import numpy as np
import tensorflow_datasets as tfds
from train.data import load_data
from train.data.cache import cached_set
root, name = pathlib.Path(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
fine = name == "cifar100"
folder = root / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
folder.mkdir(parents=True)
def write(file, n):
    images = rng.integers(256, size=(n, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(100 if fine else 10, size=(n, 1), dtype=np.uint8)
    columns = [labels // 5, labels] if fine else [labels]
    pixels = images.reshape(n, -1)
    (folder / file).write_bytes(np.concatenate([*columns, pixels], 1).tobytes())
    return images.transpose(0, 2, 3, 1), labels[:, 0]
if fine:
    names = [f"fine{i}" for i in range(100)]
    (folder / "fine_label_names.txt").write_text("\\n".join(names) + "\\n")
    coarse = "\\n".join(f"coarse{i}" for i in range(20))
    (folder / "coarse_label_names.txt").write_text(coarse + "\\n")
    parts = [write("train.bin", 30)]
else:
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta.txt").write_text("\\n".join(names) + "\\n")
    parts = [write(f"data_batch_{i}.bin", 6) for i in range(1, 6)]
test = write("test.bin" if fine else "test_batch.bin", 7)
tfds.download.DownloadManager.download_and_extract = lambda self, url: str(root)
data = load_data(f"tfds:{name}", cache_dir=sys.argv[3], image_size=None)
assert data.class_names == tuple(names), data.class_names
def contents(images, labels):
    return sorted((i.tobytes(), int(l)) for i, l in zip(images, labels))
train = [np.concatenate(p) for p in zip(*parts)]
assert contents(*train) == contents(data.train.images, data.train.labels)
assert contents(*test) == contents(data.test.images, data.test.labels)
"""
