"""Runs that hold images out: which checkpoint is best, and when a run ends."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import (
    FIT_ONE,
    assert_bitwise_equal,
    evaluate,
    final_arrays,
    last_checkpoint,
    read_metrics,
)

import inertia_jax as ij
from inertia_jax.metadata import Metadata, best_step, checkpoint_path, load_metadata
from train.__main__ import main
from train.compress.options import Compress
from train.compress.stages import load_training_images
from train.errors import UsageError
from train.experiments.study import Stage
from train.fit.best import Best
from train.networks import read_description
from train.run.checkpoints import find_checkpoint

pytestmark = pytest.mark.usefixtures("one_device")

SHARES = ["--data.test-share", "0.25", "--data.validation-share", "0.125"]


def save(path, count=160):
    """Saves ten classes of ten brightnesses, without test images, in `path`."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 10
    images = (
        rng.integers(40, size=(count, 10, 10, 1)) + 20 * labels[:, None, None, None]
    )
    images[:, 0, 0, 0] = np.arange(count)
    np.savez(path, x_train=images.astype(np.uint8), y_train=labels)
    return f"npz:{path}"


def numbers(split):
    return np.asarray(split.images)[:, 0, 0, 0].tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save(tmp_path_factory.mktemp("data") / "own.npz")


@pytest.fixture(scope="module")
def fit(data, tmp_path_factory):
    """Returns a function that trains, and returns the directory of the run."""

    def run(*options, workdir=None, code=0):
        workdir = workdir or tmp_path_factory.mktemp("runs") / "run"
        arguments = [*FIT_ONE, "--data", data, *options, "--workdir", str(workdir)]
        assert main(arguments) == code
        return workdir

    return run


@pytest.fixture(scope="module")
def run(fit):
    return fit(*SHARES)


@pytest.mark.slow
def test_a_run_tells_validation_and_test_apart(run, tmp_path, capsys):
    rows = {row["kind"]: row for row in read_metrics(run)}
    info = load_metadata(last_checkpoint(run)).info
    for kind, key in (("validation", "validation"), ("test", "evaluation")):
        found = {name: rows[kind][name] for name in info[key]}
        assert found == info[key]
    assert info["best"] == {"epoch": 1, "top1": rows["validation"]["top1"]}
    held_out = info["data"]["held_out"]
    assert {*held_out} == {"test", "validation"}
    # Evaluated again, the images are the run's test images.
    again = evaluate(run, tmp_path)
    assert again["num_examples"] == info["data"]["num_test"] == 40
    assert again["loss"] == pytest.approx(rows["test"]["loss"], rel=1e-6)


def test_a_run_says_what_is_held_out_and_what_chooses_the_best(run, fit, capsys):
    fit(*SHARES, "--resume", workdir=run)
    said = capsys.readouterr().out
    assert "40 images are held out as test images" in said
    assert "20 images are held out for validation, which chooses the best" in said
    assert "best         step_" in said and ", by validation top-1 " in said


def test_the_best_is_chosen_on_validation_images_where_there_are_some(tmp_path):
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), (8, 8, 1))
    for step, test, validation in ((1, 0.9, 0.1), (2, 0.2, 0.3), (3, 0.95, 0.3)):
        info = {"evaluation": {"top1": test}, "validation": {"top1": validation}}
        path = checkpoint_path(tmp_path / "checkpoints", step)
        ij.save_checkpoint(path, model, variables, metadata=Metadata(info=info))
    assert best_step(tmp_path / "checkpoints") == 2


def test_images_to_calibrate_on_were_trained_on(run, data):
    network = read_description(find_checkpoint(run))
    args = Compress(checkpoint=str(run), out="out", ranks="ratio:0.5", data=data)
    split = load_training_images(args, network)
    held = network.held_out_of(data)
    assert (held.test_share, held.validation_share) == (0.25, 0.125)
    assert len(split) == 100
    # Those of another set are all its training images.
    # Elsewhere there may be another source of that name, with test images.
    moved = dataclasses.replace(held, is_optional=True)
    assert network.held_out_of("npz:/elsewhere/own.npz") == moved
    assert not network.held_out_of("npz:/elsewhere/other.npz").test_share


@pytest.mark.slow
def test_finetuning_holds_the_same_images_out(run, tmp_path, capsys):
    tuned, arguments = tmp_path / "tuned", ["--epochs", "1", "--batch-size", "16"]
    verb = ["finetune", str(run), *arguments, "--workdir"]
    assert main([*verb, str(tuned)]) == 0
    infos = [load_metadata(find_checkpoint(place)).info for place in (run, tuned)]
    assert infos[0]["data"] == infos[1]["data"]
    capsys.readouterr()
    for option in ("--data.test-share", "0.3"), ("--data.split-seed", "1"):
        assert main([*verb, str(tmp_path / "other"), *option]) == 2
        said = capsys.readouterr().err
        assert (
            "its own are those of `data.test_share` 0.25 and `data.split_seed` 0"
            in said
        )
    option = ("--data.validation-share", "0.3")
    assert main([*verb, str(tmp_path / "other"), *option]) == 0
    assert (
        "holds out for validation: their accuracy is too high"
        in capsys.readouterr().err
    )


def test_a_teacher_has_not_seen_the_test_images(run, data, tmp_path, capsys):
    options = ["--data", data, "--teacher", str(run), "--data.split-seed", "1"]
    arguments = [*FIT_ONE, *options, *SHARES, "--workdir", str(tmp_path / "run")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "was trained on images that this run holds out for tests" in said
    assert "`teacher` (=" in said


def test_other_images_under_the_name_of_the_source_are_noticed(
    run, data, tmp_path, capsys
):
    source = save(tmp_path / "own.npz", 200)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", source]) == 2
    assert "own has not the images that the checkpoint" in capsys.readouterr().err
    network = read_description(find_checkpoint(run))
    args = Compress(checkpoint=str(run), out="out", ranks="ratio:0.5", data=source)
    with pytest.raises(UsageError, match="held out for test cannot be told"):
        load_training_images(args, network)


def test_the_best_epoch_is_the_first_of_equals():
    best = Best()
    for epoch, top1 in enumerate((0.1, 0.4, 0.4, 0.3), 1):
        best = best.after(epoch, top1)
    assert best == Best(2, 0.4)
    assert [best.is_over(4, patience) for patience in (1, 2, 3, None)] == [
        *(True, True, False, False)
    ]
    assert Best.of({"best": {"epoch": 2, "top1": 0.4}}) == best
    assert Best.of({}) == Best()


# Nothing is learnt, so that the first epoch is the best.
IDLE = [*SHARES, "--optimizer.learning-rate", "1e-12", "--epochs", "9"]


def epochs_of(run):
    return [row["epoch"] for row in read_metrics(run) if row["kind"] == "epoch"]


@pytest.mark.slow
def test_a_run_ends_where_validation_does_not_rise(fit, capsys):
    place = fit(*IDLE, "--early-stopping", "2")
    assert epochs_of(place) == [1, 2, 3]
    assert Stage("", ("fit",), place).is_complete()
    said = capsys.readouterr().out
    words = "ended early, after epoch 3 of 9: validation top-1 has not risen for 2"
    assert words in said
    before = final_arrays(place)
    fit(*IDLE, "--early-stopping", "2", "--resume", workdir=place)
    assert words in capsys.readouterr().out
    assert epochs_of(place) == [1, 2, 3]
    # What ends a run may be put off.
    fit(*IDLE, "--early-stopping", "3", "--resume", workdir=place)
    assert epochs_of(place) == [1, 2, 3, 4]
    straight = fit(*IDLE, "--early-stopping", "3")
    assert_bitwise_equal(final_arrays(place), final_arrays(straight))
    assert before["training"]["step"] < final_arrays(place)["training"]["step"]


def test_early_stopping_needs_a_validation_split(fit, tmp_path, capsys):
    options = ["--data.test-share", "0.25", "--early-stopping", "2"]
    fit(*options, workdir=tmp_path / "run", code=2)
    assert "`early_stopping` (=2) needs a validation split" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lengthened_run_is_one_that_was_as_long_from_the_start(fit, tmp_path):
    options = [*SHARES, "--optimizer.milestones", "1", "--epochs"]
    long, short = fit(*options, "3"), fit(*options, "2")
    copy = tmp_path / "copy"
    shutil.copytree(short, copy)
    fit(*options, "3", "--resume", workdir=copy)
    assert json.loads((copy / "config.json").read_text())["epochs"] == 3
    assert_bitwise_equal(final_arrays(long), final_arrays(copy))
    assert epochs_of(copy) == [1, 2, 3]
