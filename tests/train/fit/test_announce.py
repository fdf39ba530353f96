"""What a run says before it trains, and while it does."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest
from helpers import (
    FIT_ONE,
    make_config,
    read_metrics,
    save_bright_digits,
    synthetic_set,
)
from tqdm import tqdm

import inertia_jax as ij
from train.__main__ import main
from train.config import Data, Model, Optimizer
from train.evaluate.evaluation import Evaluation
from train.fit.announce import describe_run, first_images, gate_histograms
from train.fit.clock import TrainingClock
from train.fit.pace import Pace
from train.fit.trainer import Trainer
from train.run.events import _read_events

pytestmark = pytest.mark.usefixtures("one_device")
GATED = ij.Plan((("conv2", ij.Inertial(3, 5, threshold=ij.Learned(0.5))),)).to_json()


@pytest.fixture(scope="module")
def trainer(one_device):
    config = dataclasses.replace(
        make_config(batch_size=16),
        epochs=4,
        data=Data(source="synthetic", mean=(0.5,), std=(0.25,)),
        model=Model("lenet", width=0.1),
        optimizer=Optimizer(
            learning_rate=0.1, base_batch_size=8, milestones=(1, 3), decay=0.5
        ),
    )
    return Trainer(config, synthetic_set(8, 1), jax.devices()[:1])


def test_a_summary_names_network_cost_data_training_and_devices(trainer):
    said = describe_run(trainer)
    cost = ij.count_cost(trainer.model, (8, 8, 1))
    for words in (
        "lenet, width 0.1; layers: 2 conv",
        f"{cost.params:,} parameters, {cost.macs:,} MACs an image",
        "synthetic, 64 training and 19 test images, 10 classes; input 8x8x1",
        "4 epochs of 4 steps of 16 images; sgd, multistep from learning rate 0.2",
        "1 x cpu",
    ):
        assert words in said


def test_learning_rates_are_those_of_the_steps(trainer):
    # The rate is doubled with the batch, and halved after epochs 1 and 3 of 4 steps.
    rates = [0.2] * 4 + [0.1] * 8 + [0.05] * 4
    found = [trainer.learning_rate(step) for step in range(1, 17)]
    np.testing.assert_allclose(found, rates, rtol=1e-6)
    assert trainer.learning_rate(0) == found[0]
    assert trainer.learning_rate(99) == found[-1]


def test_images_and_gates_are_shown(trainer):
    images = first_images(trainer)
    np.testing.assert_array_equal(images, trainer.data.train.images[:16])
    evaluation = Evaluation(
        *(2, 0.1, 0.5, 1.0, np.eye(2), ("a", "b"), {}, np.ones(2, bool), np.ones(2)),
        gate_rates_by_example={"conv1": np.array([0.25, 0.75])},
    )
    variables = {
        "params": {"conv1": {"threshold": np.float32(0.5), "kernel": np.ones(3)}},
        "thresholds": {"conv2": {"core": {"threshold": np.ones(2)}}},
    }
    found = gate_histograms(evaluation, variables)
    assert set(found) == {
        *("test/gate_rate/conv1", "thresholds/conv1", "thresholds/conv2/core"),
    }
    assert found["test/gate_rate/conv1"].tolist() == [0.25, 0.75]


class Clock(TrainingClock):
    """A clock that is told the time."""

    seconds = 0.0
    compile_seconds = 12.34


def test_the_rest_is_estimated_when_steps_are_timed(capsys):
    clock, bar = Clock(0.0), tqdm(disable=True)
    pace = Pace(clock, steps=1000, batch_size=10)
    with pace.call(bar):
        pass
    assert capsys.readouterr().err == "compiled in 12.3 s\n"
    for step in range(1, 40):
        # The first call takes long, and does not count.
        clock.seconds = 100.0 + 0.25 * step
        with pace.call(bar):
            pass
        pace.after_call(step)
    # 4 steps a second are timed until step 13, and 987 are left.
    said = capsys.readouterr().err
    assert said == (
        "about 4.1 minutes of training to go at 40 images/s, evaluations apart\n"
    )


class Wandb(types.ModuleType):
    """What a run uses of wandb, and what was done with it."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **given):
        self.begun.append(given)
        return self

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


def fit_gated(tmp_path, *words):
    source = save_bright_digits(tmp_path / "set.npz", 64, 16, 8)
    options = ["--model.plan", GATED, "--workdir", str(tmp_path / "run")]
    return main([*FIT_ONE, "--data", source, *options, *words])


@pytest.mark.slow
def test_a_run_has_time_and_learning_rate_in_every_line_and_tensorboard(
    tmp_path, monkeypatch, capsys
):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert fit_gated(tmp_path, "--wandb") == 0
    said = capsys.readouterr()
    assert "compiled in " in said.err and "\r" not in said.err  # no bar here
    assert sum(line.startswith("epoch ") for line in said.out.splitlines()) == 1
    rows = read_metrics(tmp_path / "run", times=True)
    assert {row["kind"] for row in rows} == {"train", "epoch", "test"}
    times = [row["time"] for row in rows]
    assert times == sorted(times) and times[0] > 1.6e9
    assert all(row["learning_rate"] == pytest.approx(0.1) for row in rows)

    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    values = [
        value
        for event in _read_events(file.read_bytes())
        for value in event.summary.value
    ]
    tags = {value.tag for value in values}
    assert {"train/learning_rate", "test/learning_rate", "epoch/learning_rate"} <= tags
    histograms = {value.tag for value in values if value.HasField("histo")}
    assert histograms == {"test/gate_rate/conv2", "thresholds/conv2"}
    assert {value.tag for value in values if value.HasField("image")} == {
        "train/images"
    }
    assert any("hparams" in tag for tag in tags)
    (text,) = (v for v in values if v.tag.startswith("config"))
    assert b"|optimizer.learning_rate|0.1|" in text.tensor.string_val[0]

    (begun,) = wandb.begun
    assert begun["name"] == "run" and begun["config"]["batch_size"] == 16
    assert wandb.finished == 1
    assert [step for step, _ in wandb.logged] == [row["step"] for row in rows]
    names = {name for _, metrics in wandb.logged for name in metrics}
    assert {"test/top1", "train/loss", "epoch/learning_rate"} <= names


def test_wandb_that_is_not_there_is_said_before_anything_is_read(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert fit_gated(tmp_path, "--wandb") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `--wandb` needs wandb: ")
    assert "[wandb]" in line
    assert not (tmp_path / "run").exists()


def test_wandb_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    wandb = Wandb()

    def fail(metrics, *, step):
        raise RuntimeError("no network")

    wandb.log = fail
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert fit_gated(tmp_path, "--wandb") == 0
    said = capsys.readouterr().err
    warning = "warning: no more metrics for Weights & Biases: RuntimeError: no network"
    assert said.count(warning) == 1
