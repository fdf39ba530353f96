"""The program, end to end: training, resuming, evaluating, refusing."""

import fcntl
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, shared_file
from helpers import (
    assert_bitwise_equal,
    exact_cifar10,
    final_arrays,
    last_checkpoint,
    read_metrics,
    save_bright_digits,
    start,
)

import inertia_jax as ij
from inertia_jax.metadata import Metadata, checkpoint_path, load_metadata
from train.__main__ import VERBS, main
from train.config_file import load_config
from train.errors import UsageError
from train.evaluate.evaluation import Evaluation
from train.fit.checks import warn_of_learning_rate
from train.fit.loop import FitResult, summary
from train.machine.processes import warn
from train.networks import make_model
from train.options.fit import parse
from train.run.checkpoints import best_step, latest_steps
from train.run.report import format_curve

FIT = [
    "fit",
    *("--batch-size", "16", "--epochs", "3", "--seed", "3", "--log-steps", "2"),
    *("--data.mean", "0.5", "--data.std", "0.25", "--data.crop-padding", "1"),
    *("--model.name", "lenet", "--model.width", "0.2"),
    *("--optimizer.learning-rate", "0.02"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten classes that differ in brightness: learnt in a few steps."""
    path = tmp_path_factory.mktemp("data") / "set.npz"
    return save_bright_digits(path, 165, 37, 10)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run, on eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert main([*FIT, "--data.source", data, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.mark.slow
def test_a_run_leaves_everything_it_promises(run, data):
    lines = read_metrics(run, times=True)
    kinds = [line["kind"] for line in lines]
    assert kinds.count("epoch") == kinds.count("test") == 3
    assert kinds.count("train") == 3 * 5  # every second of ten steps an epoch
    test = [line for line in lines if line["kind"] == "test"]
    assert test[-1]["top1"] > test[0]["top1"]
    values = {"loss", "accuracy", "learning_rate", "images_per_s"}
    assert lines[0].keys() == {"step", "kind", "time"} | values
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 3 and config["data"]["source"] == data
    made = json.loads((run / "run.jsonl").read_text())
    assert made["versions"]["jax"] == jax.__version__ and made["num_devices"] == 8
    events = b"".join(f.read_bytes() for f in (run / "tensorboard").iterdir())
    assert b"test/top1" in events and b"train/loss" in events


@pytest.mark.slow
def test_the_best_and_the_latest_two_are_kept(run):
    steps = latest_steps(run / "checkpoints")
    assert steps[-2:] == [20, 30]
    assert set(steps) == {20, 30, best_step(run / "checkpoints")}
    info = load_metadata(run / "checkpoints" / "step_00000030").info
    assert info["step"] == 30 and info["config"]["epochs"] == 3
    assert not [p for p in (run / "checkpoints").iterdir() if "partial" in p.name]


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_evaluation_counts_every_example_once(run, data, devices, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    options = ["--devices", str(devices), "--batch-size", "10", "--out", str(out)]
    assert main(["evaluate", str(run), *options]) == 0
    found = json.loads(out.read_text())
    with np.load(data.removeprefix("npz:")) as archive:
        images, labels = archive["x_test"], archive["y_test"]
    best = run / "checkpoints" / f"step_{best_step(run / 'checkpoints'):08d}"
    model, variables = ij.load_checkpoint(best)
    logits = np.asarray(model.apply(variables, (images / 255 - 0.5) / 0.25), np.float64)
    predictions = logits.argmax(-1)
    confusion = np.zeros((10, 10), int)
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label, prediction] += 1
    order = (-logits).argsort(-1)
    top5 = np.mean([y in row[:5] for y, row in zip(labels, order, strict=True)])
    log_z = np.log(np.exp(logits).sum(-1))
    losses = log_z - logits[np.arange(37), labels]
    assert found["num_examples"] == 37
    assert found["confusion"] == confusion.tolist()
    np.testing.assert_allclose(found["top1"], (predictions == labels).mean())
    np.testing.assert_allclose(found["top5"], top5)
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        found["per_class"], np.diag(confusion) / confusion.sum(1)
    )
    assert "of 37" in capsys.readouterr().out


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Thirty epochs on one device, in a process of its own."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    cache = str(ROOT / ".pytest_cache" / "jax")
    env |= {"JAX_COMPILATION_CACHE_DIR": cache}
    # Every run of it then executes the very same programs.
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = [*FIT, "--epochs", "30", "--checkpoint-steps", "3"]
    arguments += ["--data.source", data]
    process = start(["-m", "train", *arguments, "--workdir", str(workdir)], env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return arguments, env, workdir


@pytest.mark.slow
def test_ten_random_kills_change_no_bit(uninterrupted, tmp_path):
    arguments, env, whole = uninterrupted
    workdir = tmp_path / "run"
    random.seed(0)
    kills = 0
    while kills < 10:
        process = start(
            ["-m", "train", *arguments, "--workdir", str(workdir), "--resume"], env
        )
        metrics = workdir / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        # The run itself takes under a second; wait for its first sign of life.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.stat().st_mtime_ns > before:
                break
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.15))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    last = start(
        ["-m", "train", *arguments, "--workdir", str(workdir), "--resume"], env
    )
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert kills == 10, "the run was over before it had been killed ten times"
    assert_bitwise_equal(final_arrays(workdir), final_arrays(whole))
    ours, theirs = (
        [line for line in read_metrics(w) if line["kind"] == "test"]
        for w in (workdir, whole)
    )
    assert ours == theirs


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(uninterrupted, tmp_path):
    arguments, env, whole = uninterrupted
    workdir = tmp_path / "run"
    process = start(["-m", "train", *arguments, "--workdir", str(workdir)], env)
    while process.poll() is None and not (workdir / "metrics.jsonl").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM and saved at step" in output
    stopped_at = latest_steps(workdir / "checkpoints")[-1]
    assert 0 < stopped_at < 300
    process = start(
        ["-m", "train", *arguments, "--workdir", str(workdir), "--resume"], env
    )
    output, _ = process.communicate(timeout=120)
    assert f"step {stopped_at} of 300" in output
    assert_bitwise_equal(final_arrays(workdir), final_arrays(whole))


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    run, data, tmp_path, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    latest = copy / "checkpoints" / "step_00000030"
    file = max((latest / "arrays").rglob("*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    arguments = [*FIT, "--data.source", data, "--workdir", str(copy), "--resume"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "step_00000030 is damaged" in captured.err
    assert (copy / "checkpoints" / "damaged_step_00000030").is_dir()
    assert "step 20 of 30" in captured.out
    assert_bitwise_equal(final_arrays(copy), final_arrays(run))
    assert main(["evaluate", str(latest)]) == 0


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    run, data, tmp_path, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        (checkpoint / "manifest.json").write_text("{}")
    before = sorted(copy.rglob("*"))
    for _ in range(2):
        arguments = [*FIT, "--data.source", data, "--workdir", str(copy), "--resume"]
        assert main(arguments) == 2
        assert "is damaged; nothing was changed" in capsys.readouterr().err
        assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "config"), [("config.json", '{"hidden": 3}'), ("notes.txt", '{"seed": 1}')]
)
def test_another_programs_directory_is_left_alone(name, config, data, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / name).write_text(config)
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    arguments = [*FIT, "--data.source", data, "--workdir", str(tmp_path)]
    for options in ([], ["--resume"]):
        assert main([*arguments, *options]) == 2
        assert "holds no run; nothing was changed" in capsys.readouterr().err
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before


def test_a_broken_description_is_not_the_best(run, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", copy)
    steps = latest_steps(copy)
    best = best_step(copy)
    broken = []
    for old, new in (('"std"', '"stt"'), ('"top1"', '"tpp1"')):
        if best is not None:
            file = copy / f"step_{best:08d}" / "metadata.json"
            file.write_text(file.read_text().replace(old, new))
            broken.append(best)
            best = best_step(copy)
            assert best not in broken and (best is None or best in steps)
    assert broken


def test_what_cannot_be_read_is_not_put_aside(run, data, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def fail(file, digest):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    arguments = [*FIT, "--data.source", data, "--workdir", str(copy), "--resume"]
    assert main(arguments) == 2
    assert "cannot read" in capsys.readouterr().err
    assert not list((copy / "checkpoints").glob("damaged*"))


def test_another_config_is_refused_and_nothing_changed(run, data, capsys):
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    arguments = [*FIT, "--data.source", data, "--workdir", str(run)]
    assert main([*arguments, "--optimizer.momentum", "0.5", "--resume"]) == 2
    assert "optimizer.momentum: 0.9 there, 0.5 here" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*arguments[:-1], str(run / "checkpoints"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("epochs", "schedule", "others", "way"),
    [
        (5, "cosine", ["--resume"], "finetune"),
        (2, "cosine", ["--resume"], None),
        (2, "multistep", ["--resume"], None),
        (5, "multistep", ["--resume", "--batch-size", "8"], None),
        (5, "multistep", [], "--resume goes on with it until epoch 5."),
        (5, "cosine", [], "finetune"),
    ],
)
def test_more_epochs_that_change_the_past_are_a_finetuning(
    epochs, schedule, others, way, run, data, tmp_path, capsys
):
    # The run is the same but for its schedule, which nothing read here depends on.
    place = tmp_path / "run"
    shutil.copytree(run, place)
    config = json.loads((place / "config.json").read_text())
    config["optimizer"]["schedule"] = schedule
    (place / "config.json").write_text(json.dumps(config))
    arguments = [*FIT, "--data.source", data, "--workdir", str(place)]
    arguments += ["--epochs", str(epochs), "--optimizer.schedule", schedule]
    assert main([*arguments, *others]) == 2
    said = capsys.readouterr().err
    assert f"epochs: 3 there, {epochs} here" in said
    assert ("finetune" in said) == (way == "finetune")
    assert ("it is a new run" in said) == (way == "finetune")
    assert ("goes on" in said) == (way is not None and "goes on" in way)
    if way == "finetune":
        _, *words = shlex.split(said.splitlines()[-1])
        command = ["-m", "train", "finetune", str(place), "--epochs", str(epochs - 3)]
        assert words == command
    elif way is not None:
        assert way in said


def test_of_equal_checkpoints_the_first_is_called_the_best(tmp_path):
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), (8, 8, 1))
    for step, top1 in ((1, 0.1), (2, 0.5), (3, 0.5)):
        metadata = Metadata(info={"evaluation": {"top1": top1}})
        path = checkpoint_path(tmp_path / "checkpoints", step)
        ij.save_checkpoint(path, model, variables, metadata=metadata)
        evaluation = Evaluation(
            *(2, 0.1, top1, 1.0, np.eye(2), ("a", "b"), {}, np.ones(2, bool)),
            predictions=np.arange(2),
        )
        said = summary(FitResult(tmp_path, step, evaluation, None))
        tie = ", the first of those with this accuracy" if step == 3 else ""
        best = f"step_0000000{min(step, 2)}, test top-1 {min(top1, 0.5):.2%}{tie}"
        assert f"\nbest         {best}\n" in said

    rows = [(1, 0.1), (2, 0.5), (3, 0.5)]
    numbers = dict.fromkeys(
        ("train_loss", "train_accuracy", "test_loss", "images_per_s"), 0.5
    )
    curve = [{"epoch": epoch, "test_top1": top1, **numbers} for epoch, top1 in rows]
    best = "best: epoch 2, test top-1 50.00%"
    for count, end in ((3, ", the first of 2 with this accuracy"), (2, "")):
        assert format_curve({"curve": curve[:count]}).endswith(best + end)
    judged = [
        {**r, "validation_top1": v} for r, v in zip(curve, (0.2, 0.3, 0.1), strict=True)
    ]
    said = "best: epoch 2, validation top-1 30.00%; test top-1 50.00%"
    assert format_curve({"curve": judged}).endswith(said)


def test_a_finished_run_is_evaluated_again(run, data, capsys):
    arguments = [*FIT, "--data.source", data, "--workdir", str(run), "--resume"]
    assert main(arguments) == 0
    assert "step 30 of 30" in capsys.readouterr().out


TOO_LARGE = ij.Plan((("conv2", ij.Inertial(5, 6)),)).to_json()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.name", "resnet19"], "resnet19"),
        (["--model.plan", "{"], "a plan must be JSON"),
        (["--data.source", "mnits"], "must be tfds:NAME"),
        (["--data.source", "npz:none.npz"], "no file none.npz"),
        (["--batch-size", "12"], "multiple of the 8 devices"),
        (["--batch-size", "800"], "at most 165"),
        (["--epochs", "0"], "`epochs`"),
        (["--seed", "-1"], "`seed` .* must be >= 0"),
        (["--data.std", "nan"], "`data.std` .=nan. must be finite"),
        (["--optimizer.learning-rate", "inf"], "`optimizer.learning_rate` .* finite"),
        (["--distill-weight", "0.3"], "`distill_weight` .*nothing with `teacher`"),
        (["--gate-penalty", "2"], "`gate_penalty` .*nothing with `gate_budget`"),
        (
            ["--optimizer.name", "adadelta", "--optimizer.momentum", "0.5"],
            "`optimizer.momentum` .*nothing with `optimizer.name` .=adadelta",
        ),
        (
            ["--optimizer.schedule", "cosine", "--optimizer.milestones", "3"],
            "`optimizer.milestones` .*nothing with `optimizer.schedule` .=cosine",
        ),
        (["--optimizer.peak-share", "0.5"], "`optimizer.peak_share` .*nothing"),
        (["--optimizer.decay-epochs", "2"], "`optimizer.decay_epochs` .*nothing"),
        (["--data.no-flip", "--data.flip-mode", "alternating"], "`data.flip_mode` .*"),
        (
            ["--data.resized-crop", "--data.crop-padding", "9"],
            "`data.crop_padding` .*nothing with `data.resized_crop`",
        ),
        (
            ["--optimizer.nesterov", "--optimizer.momentum", "0"],
            "`optimizer.nesterov` .*nothing with `optimizer.momentum` .=0",
        ),
        (["--model.shortcut", "B"], "`shortcut` .='B'. must be A for lenet"),
        (["--model.strict"], "`model.strict` .*nothing with `model.plan`"),
        (
            ["--model.strict", "--model.plan", TOO_LARGE],
            "conv2 stays dense: core 5 exceeds kernel 3",
        ),
        (["--data.image-size", "16", "--data.eval-resize", "4"], "`resize` .* 16"),
        (["--data.mean", "0.5", "0.5"], "`data.mean` .* must have 1 entries"),
        (["--model.name", "vgg16"], "at least 32 x 32"),
        (["--model.dtype", "float64"], "JAX_ENABLE_X64"),
        (["--optimizer.label-smoothing", "1"], "label_smoothing"),
        (["--devices", "9"], "`devices` .*in \\[1, 8\\]"),
        (["--config", "none.py"], "no config file at none.py"),
        (["--optimizer.decay", "-1"], "`optimizer.decay`"),
        (["--optimizer.milestones", "3", "3"], "`optimizer.milestones`"),
        (["--optimizer.milestones", "1", str(10**400)], r"`optimizer.mile.* < 2\*\*63"),
        (["--epochs", str(10**400)], r"`epochs` .*000\.\.\. .* must be < 2\*\*63"),
        (["--process-id", "1"], "needs `--coordinator`"),
        (["--optimizer.ema-decay", "1"], "`optimizer.ema_decay` .* must be < 1"),
        (["--optimizer.peak-share", "0"], "`optimizer.peak_share` .* must be > 0"),
        (["--optimizer.base-batch-size", "0"], "`optimizer.base_batch_size` .* >= 1"),
        (
            ["--optimizer.schedule", "one_cycle", "--optimizer.warmup-epochs", "1"],
            "`optimizer.warmup_epochs` .* must be 0 for `schedule` .*'one_cycle'",
        ),
    ],
)
def test_bad_input_is_one_error_and_code_2(arguments, message, data, tmp_path, capsys):
    workdir = tmp_path / "run"
    code = main([*FIT, "--data.source", data, *arguments, "--workdir", str(workdir)])
    error = capsys.readouterr().err
    assert code == 2
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    assert re.search(message, error), error
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("mnist_lenet", ["--optimizer.schedule", "cosine"]),
        ("cifar10_resnet18_fast", ["--data.no-flip", "--data.crop-padding", "0"]),
        ("cifar10_resnet18_fast", ["--optimizer.name", "adadelta"]),
    ],
)
def test_what_lies_idle_in_a_file_is_nobodys_mistake(config, options):
    arguments = ["--config", f"configs/{config}.py", *options]
    assert parse(arguments).run.name == config
    with pytest.raises(UsageError, match="`optimizer.peak_share` .*nothing"):
        schedule = ["--optimizer.schedule", "cosine", "--optimizer.peak-share", "0.5"]
        parse([*arguments, *schedule])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([verb, "--help"])
    assert exit_info.value.code == 0
    assert f"python -m train {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["train"], [], ["fit", "--epoch", "3"], ["fit", "--model.dtype", "int8"]],
)
def test_unknown_words_exit_with_2_or_show_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == (2 if arguments else 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("Config(epoch=3)", "'epoch'"),
        (
            "Config(optimizer=Optimizer(name='adam'))",
            "`name` .*'adam'.* must be one of",
        ),
        ("Config(data=Data(crop_mode='edge'))", "`crop_mode` .*'edge'.* must be one"),
        ("Config(data=Data(flip_mode='often'))", "`flip_mode` .*'often'.* must be"),
        ("Config(parallel='pjit')", "`parallel` .*'pjit'"),
        ("Cofnig()", "NameError"),
        ("3", "must define `config`"),
    ],
)
def test_a_bad_config_file_is_one_error(code, message, tmp_path, capsys):
    file = tmp_path / "broken.py"
    file.write_text(f"from train.config import *\nconfig = {code}\n")
    assert main(["fit", "--config", str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_one_run_at_a_time_in_a_directory(run, data, capsys):
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = [*FIT, "--data.source", data, "--workdir", str(run), "--resume"]
        assert main(arguments) == 2
    assert "another process is training" in capsys.readouterr().err


def test_other_data_under_the_same_name_is_noticed(run, data, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = pathlib.Path(data.removeprefix("npz:"))
    content = file.read_bytes()
    with np.load(file) as archive:
        arrays = dict(archive)
    try:
        shorter = {k: arrays[k][:150] for k in ("x_train", "y_train")}
        np.savez(file, **{**arrays, **shorter})
        arguments = [*FIT, "--data.source", data, "--workdir", str(copy), "--resume"]
        assert main(arguments) == 2
    finally:
        file.write_bytes(content)
    assert "num_train: 165 there, 150 here" in capsys.readouterr().err


def test_data_that_moved_are_gone_on_with(run, data, tmp_path, capsys):
    copy, moved = tmp_path / "run", tmp_path / "set.npz"
    shutil.copytree(run, copy)
    shutil.copy(data.removeprefix("npz:"), moved)
    arguments = [*FIT, "--workdir", str(copy), "--resume", "--epochs", "4"]
    arguments += ["--data.source", f"npz:{moved}", "--data.cache-dir", str(tmp_path)]
    assert main(arguments) == 2
    assert "data.source" in capsys.readouterr().err
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= {"source": f"npz:{moved}", "cache_dir": str(tmp_path)}
    (copy / "config.json").write_text(json.dumps({**config, "epochs": 4}))
    assert main(arguments) == 0
    assert "step 30 of 40" in capsys.readouterr().out
    assert latest_steps(copy / "checkpoints")[-2:] == [30, 40]


@pytest.mark.slow
def test_an_infinite_loss_stops_and_keeps_the_last_good_checkpoint(
    data, tmp_path, capsys
):
    workdir = tmp_path / "run"
    # The learning rate becomes 2e36 with the second epoch: steps 10, 11, ...
    options = ["--optimizer.milestones", "1", "--optimizer.decay", "1e38"]
    arguments = [*FIT, *options, "--data.source", data, "--workdir", str(workdir)]
    assert main(arguments) == 2
    assert "not finite at step 11; stopped" in capsys.readouterr().err
    assert latest_steps(workdir / "checkpoints") == [10]
    assert main(["evaluate", str(workdir)]) == 0
    # A run that saved nothing leaves its place to the next.
    workdir = tmp_path / "nothing"
    arguments = [*FIT, "--data.source", data, "--workdir", str(workdir)]
    assert main([*arguments, "--optimizer.learning-rate", "1e30"]) == 2
    assert "no checkpoint had been saved yet" in capsys.readouterr().err
    assert main([*arguments, "--epochs", "1", "--resume"]) == 0
    starts = (workdir / "run.jsonl").read_text().splitlines()
    assert len(starts) == 1  # nothing of the other run


def fill(disk, process):
    """Leaves room on it for lines of metrics, not for a checkpoint."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)  # until its threads have stopped
    room = os.statvfs(disk)
    with (disk / "ballast").open("ab") as ballast:
        ballast.write(bytes(max(room.f_bavail * room.f_bsize - 65_536, 0)))
    process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_full_disk_is_one_error(uninterrupted, data, tmp_path):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root, to mount a small disk")
    arguments, env, _ = uninterrupted
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        workdir = disk / "run"
        process = start(
            ["-m", "train", *arguments, "--epochs", "500", "--workdir", str(workdir)],
            env,
        )
        while not latest_steps(workdir / "checkpoints") and process.poll() is None:
            time.sleep(0.002)
        while process.poll() is None:
            fill(disk, process)
            time.sleep(0.1)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        assert output.count("error:") == 1 and "Traceback" not in output
        assert "could not write" in output and "the latest on disk is step" in output
        assert "No space left on device; free some space, then run the same" in output
        ij.load_checkpoint(last_checkpoint(workdir))
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", str(disk)], check=True)


def test_evaluate_refuses_what_does_not_fit(run, data, tmp_path, capsys):
    rng = np.random.default_rng(0)

    def error(shape, labels):
        images = rng.integers(256, size=(12, *shape), dtype=np.uint8)
        np.savez(tmp_path / "set.npz", x_test=images, y_test=labels)
        source = f"npz:{tmp_path / 'set.npz'}"
        assert main(["evaluate", str(run), "--data", source]) == 2
        return capsys.readouterr().err

    assert "has 3 channels" in error((10, 10, 3), np.arange(12) % 10)
    assert "--resize" in error((12, 10, 1), np.arange(12) % 10)
    assert "label 11" in error((10, 10, 1), np.arange(12))
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"")
    assert main(["evaluate", str(weights)]) == 2
    assert "-m train import` makes one" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_resnet20_is_imported_and_scores_what_it_should(tmp_path, capsys):
    weights, images = (
        shared_file("weights/resnet20_cifar10.pth"),
        exact_cifar10(tmp_path),
    )
    out = str(tmp_path / "checkpoint")
    statistics = [
        "--mean",
        "0.485",
        "0.456",
        "0.406",
        "--std",
        "0.229",
        "0.224",
        "0.225",
    ]
    command = ["import", str(weights), "--model", "resnet20", *statistics, "--out", out]
    assert main(command) == 0
    assert "269,722 parameters" in capsys.readouterr().out
    assert main(["evaluate", out, "--data", images]) == 0
    assert "(933 of 1,017)" in capsys.readouterr().out
    assert main(command) == 2
    assert "must not exist" in capsys.readouterr().err
    other = ["import", str(weights), "--model", "resnet32", *statistics]
    assert main([*other, "--out", str(tmp_path / "other")]) == 2
    assert "missing layer1.3.conv1.weight" in capsys.readouterr().err
    assert main(["evaluate", out]) == 2
    assert "say which with --data" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=str)
def test_every_config_makes_its_model(file, capsys):
    config = load_config(file)
    assert config.name == file.stem
    if file.stem == "cifar10_resnet18":
        recipe = config.optimizer
        assert (config.batch_size, config.epochs, config.seed) == (128, 200, 1)
        assert (recipe.learning_rate, recipe.momentum) == (0.1, 0.9)
        assert (recipe.weight_decay, recipe.milestones) == (5e-4, (150, 225))
        assert config.data.mean == (0.4914, 0.4822, 0.4465)
        assert config.data.std == (0.2023, 0.1994, 0.2010)
    warn.cache_clear()
    warn_of_learning_rate(config)
    assert not capsys.readouterr().err
    classes = 100 if "cifar100" in file.stem else 10
    model = make_model(config.model, num_classes=classes)
    assert model.num_classes == classes
    assert model.width == config.model.width


def test_checkpoints_are_compared_on_the_same_images(run, data, tmp_path, capsys):
    other, source = tmp_path / "run", tmp_path / "other.npz"
    archive = dict(np.load(data.removeprefix("npz:")))
    archive["x_test"] = 255 - archive["x_test"]
    np.savez(source, **archive)
    arguments = [*FIT, "--epochs", "1", "--data.source", f"npz:{source}"]
    assert main([*arguments, "--workdir", str(other)]) == 0
    found = {}
    for place in (other, run):
        out = tmp_path / "evaluation.json"
        arguments = ["evaluate", str(place), "--data", data, "--out", str(out)]
        assert main(arguments) == 0
        found[place] = json.loads(out.read_text())["top1"]
    assert main(["evaluate", str(run), "--against", str(other), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["against"] == found[other]


def test_other_names_of_classes_are_said(run, data, tmp_path, capsys):
    archive = dict(np.load(data.removeprefix("npz:")))
    names = {"one": list("abcdefghij"), "two": list("abxcefghij")}
    for name, listed in names.items():
        np.savez(tmp_path / f"{name}.npz", **archive, label_names=listed)
    arguments = [*FIT, "--epochs", "1", "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--data.source", f"npz:{tmp_path / 'one.npz'}"]) == 0
    capsys.readouterr()
    arguments = ["evaluate", str(tmp_path / "run"), "--data"]
    assert main([*arguments, f"npz:{tmp_path / 'two.npz'}"]) == 0
    assert "label 2 is 'x' in two and 'c' in the checkpoint" in capsys.readouterr().err
    assert main([*arguments, data]) == 0  # unnamed: numbers alone
    assert "warning" not in capsys.readouterr().err


def test_training_starts_from_a_run_of_the_same_normalisation(
    run, data, tmp_path, capsys
):
    arguments = [*FIT, "--data.source", data, "--epochs", "1", "--init", str(run)]
    assert main([*arguments, "--workdir", str(tmp_path / "a")]) == 0
    arguments += ["--data.mean", "0.4", "--workdir", str(tmp_path / "b")]
    assert main(arguments) == 2
    assert "was trained with `mean` (0.5,)" in capsys.readouterr().err


def test_outputs_are_looked_at_before_the_work(run, tmp_path, capsys):
    out = str(tmp_path / "none" / "x.json")
    for arguments in (
        ["evaluate", str(run), "--out", out],
        ["compress", str(run), "--macs", "0.9", "--out", "x", "--record", out],
        ["benchmark", "--suite", "ops", "--out", out],
    ):
        assert main(arguments) == 2
        assert "does not exist" in capsys.readouterr().err
