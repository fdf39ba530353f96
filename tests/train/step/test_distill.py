"""Distillation: the loss, the teacher's checkpoint, and training from end to end."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GREY,
    INPUTS,
    LABELS,
    PREPROCESSING,
    SHAPE,
    Small,
    assert_bitwise_equal,
    compilations,
    final_arrays,
    flat,
    make_config,
    relative,
    stop_at,
    synthetic_set,
    take_steps,
    train_steps,
)

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.config import Config, Model, Optimizer
from train.errors import UsageError
from train.fit.teacher import load_teacher
from train.fit.trainer import Trainer
from train.machine.processes import warn
from train.step.distill import Distillation, distillation_loss


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def their_loss(logits, teacher_logits, temperature):
    """The formula, in NumPy and float64."""
    p = softmax(np.float64(teacher_logits) / temperature)
    q = softmax(np.float64(logits) / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_and_its_gradient_are_pytorchs(temperature, x64):
    rng = np.random.default_rng(0)
    logits, teacher_logits = 3 * rng.normal(size=(2, 7, 5))

    def total(logits):
        losses = distillation_loss(
            logits, jnp.asarray(teacher_logits), temperature=temperature
        )
        return losses.mean(), losses

    gradient_fn = jax.jit(jax.value_and_grad(total, has_aux=True))
    (mean, losses), gradient = gradient_fn(jnp.asarray(logits))
    np.testing.assert_allclose(losses, their_loss(logits, teacher_logits, temperature))
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    theirs = torch.from_numpy(logits).requires_grad_()
    loss = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(theirs / temperature, -1),
        torch.softmax(torch.from_numpy(teacher_logits) / temperature, -1),
        reduction="batchmean",
    )
    loss.backward()
    np.testing.assert_allclose(mean, loss.item())
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-12)


def test_the_loss_is_finite_for_sure_answers_and_exact_in_float32():
    sure = jnp.array([[200.0, 0.0, -200.0]], jnp.bfloat16)
    losses = distillation_loss(-sure, sure, temperature=1.0)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, [400.0])
    assert float(distillation_loss(sure, sure, temperature=2.0)[0]) == 0


def taught(teacher, weight, temperature, **options):
    """Returns first and last state after a step with a teacher of random weights."""
    variables = ij.init_variables(teacher, jax.random.key(1), INPUTS.shape[1:])
    # Statistics unlike the batch's, so that its mode shows.
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    variables = {**variables, "batch_stats": stats}
    states = take_steps(
        Small(),
        1,
        distillation=Distillation(teacher, weight, temperature),
        teacher=variables,
        **options,
    )
    return variables, *states


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (1.0, 4.0)])
def test_the_step_follows_both_losses_and_reports_one(weight, temperature, smoothing):
    plain = Optimizer(learning_rate=0.5, momentum=0.0, weight_decay=0.0)
    teacher = Small(features=6)
    variables, first, last = taught(
        teacher, weight, temperature, optimizer=plain, label_smoothing=smoothing
    )
    answers = teacher.apply(variables, INPUTS, train=False)
    targets = (1 - smoothing) * jax.nn.one_hot(LABELS, 10) + smoothing / 10

    def losses(params):
        logits, _ = Small().apply(
            {**first.variables, "params": params},
            INPUTS,
            train=True,
            mutable=["batch_stats"],
        )
        hard = -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()
        p = jax.nn.softmax(answers / temperature)
        q = jax.nn.softmax(logits / temperature)
        soft = (p * (jnp.log(p) - jnp.log(q))).sum(-1).mean()
        return (1 - weight) * hard + weight * temperature**2 * soft, hard

    (_, hard), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(
        first.params
    )
    expected = flat(jax.tree.map(lambda p, g: p - 0.5 * g, first.params, gradient))
    for path, value in flat(last.params).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(last.totals.loss / last.totals.count, hard, rtol=1e-5)


def test_each_network_computes_in_its_own_type():
    seen = []

    class Spy(Small):
        def __call__(self, x, *, train=False):
            seen.append((self.dtype, x.dtype.name, train))
            return super().__call__(x, train=train)

    variables = ij.init_variables(Spy(), jax.random.key(1), INPUTS.shape[1:])
    seen.clear()
    take_steps(
        Spy(dtype="bfloat16"),
        1,
        distillation=Distillation(Spy(), 0.5, 1.0),
        teacher=variables,
    )
    assert {inputs for dtype, inputs, _ in seen if dtype == "float32"} == {"float32"}
    assert {inputs for _, inputs, train in seen if train} == {"bfloat16"}


def test_a_teacher_with_its_classes_in_another_order_teaches_by_name():
    model = Small()
    one = ij.init_variables(model, jax.random.key(1), INPUTS.shape[1:])
    order = tuple(range(10))[::-1]
    head = jax.tree.map(lambda leaf: leaf[..., order], one["params"]["fc"])
    other = {**one, "params": {**one["params"], "fc": head}}
    _, same = take_steps(
        model, 1, distillation=Distillation(model, 1.0, 1.0), teacher=one
    )
    _, mapped = take_steps(
        model, 1, distillation=Distillation(model, 1.0, 1.0, order), teacher=other
    )
    jax.tree.map(np.testing.assert_array_equal, mapped.params, same.params)


def save(
    path, name="lenet", *, seed=0, preprocessing=PREPROCESSING, classes=(), **options
):
    """Makes a checkpoint of a network that was never trained."""
    model = ij.create_model(name, **{"width": 0.06, **options})
    variables = ij.init_variables(model, jax.random.key(seed), SHAPE)
    classes = classes or tuple(map(str, range(model.num_classes)))
    metadata = Metadata(preprocessing, classes, {"evaluation": None})
    ij.save_checkpoint(path, model, variables, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run whose checkpoint is of another architecture than the students here."""
    path = tmp_path_factory.mktemp("teacher") / "run" / "checkpoints" / "step_00000007"
    save(path, "resnet20", seed=1)
    return path.parents[1]


def student(teacher, **options):
    return dataclasses.replace(
        make_config(freeze=("conv2", "fc2/bias"), **options),
        data=GREY,
        teacher=str(teacher),
        model=Model("lenet", width=0.06, dtype="float64"),
    )


IMAGES = synthetic_set(8, 1)


@pytest.fixture(scope="module")
def one_device(teacher):
    with jax.enable_x64(True):
        return train_steps(student(teacher), IMAGES, 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_devices", "parallel", "steps_per_call"),
    [(8, "pmap", 2), (8, "shard_map", 1), (1, "shard_map", 2)],
)
def test_four_steps_agree_over_devices(
    x64, one_device, teacher, num_devices, parallel, steps_per_call
):
    config = student(teacher, parallel=parallel, steps_per_call=steps_per_call)
    values = train_steps(config, IMAGES, num_devices, 4)
    assert relative(values, one_device) < 1e-9


@pytest.mark.slow
def test_the_teacher_is_an_argument_that_is_kept(x64, teacher):
    config = student(teacher, parallel="shard_map")
    trainer = Trainer(config, IMAGES, jax.devices()[:1])
    inputs = next(trainer.inputs(0, 0))
    variables = trainer.teacher_variables
    first, _ = trainer.train_call(trainer.init_state(), inputs)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
    assert variables["params"]["conv1"]["kernel"].dtype == jnp.float32
    # Another teacher's numbers teach something else, without another program.
    trainer.teacher_variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    state = trainer.init_state()
    with compilations() as compiled:
        second, _ = trainer.train_call(state, inputs)
    assert not compiled
    assert np.any(first.params["fc1"]["kernel"] != second.params["fc1"]["kernel"])


def test_ladders_are_left_out_of_the_step(tmp_path):
    spec = ij.Inertial(3, 4, reading="tiled", capacities=(0.5, 1.0))
    path = save(tmp_path / "inertial", plan=ij.Plan((("conv2", spec),)))
    found = load_teacher(Config(teacher=str(path)), PREPROCESSING, IMAGES)
    assert found.distillation.model.plan.spec("conv2") == dataclasses.replace(
        spec, capacities=None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, r"num_classes: 7 there, 10 here\.$"),
        (
            {"preprocessing": Preprocessing((9, 8, 1), (0.4,), (0.2,), 12)},
            r"image_shape: \(9, 8, 1\) there, \(8, 8, 1\) here; mean: \(0.4,\) there, "
            r"\(0.5,\) here; std: \(0.2,\) .*; resize: 12 there, None here\.$",
        ),
        ({"preprocessing": None}, "has no preprocessing"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options, message, tmp_path):
    path = save(tmp_path / "teacher", **options)
    with pytest.raises(UsageError, match=rf"^`teacher` \(={path}\) .*{message}"):
        load_teacher(Config(teacher=str(path)), PREPROCESSING, IMAGES)


def test_a_teacher_tells_where_its_classes_are(tmp_path, capsys):
    names = tuple("abcdefghij")
    teacher = save(tmp_path / "teacher", classes=names)
    config = Config(teacher=str(teacher))
    for own, order in ((names, range(10)), (names[::-1], range(9, -1, -1))):
        data = dataclasses.replace(IMAGES, class_names=own)
        found = load_teacher(config, PREPROCESSING, data)
        assert found.distillation.order == tuple(order)
    warn.cache_clear()
    other = dataclasses.replace(IMAGES, class_names=("x", *names[1:]))
    assert load_teacher(config, PREPROCESSING, other).distillation.order is None
    assert "label 0 is 'x'" in capsys.readouterr().err


def test_a_teacher_in_float64_needs_float64(tmp_path, x64):
    config = Config(teacher=str(save(tmp_path / "teacher", dtype="float64")))
    load_teacher(config, PREPROCESSING, IMAGES)
    with jax.enable_x64(False), pytest.raises(UsageError, match="JAX_ENABLE_X64=1"):
        load_teacher(config, PREPROCESSING, IMAGES)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set.npz"
    arrays = {"x_train": IMAGES.train.images, "y_train": IMAGES.train.labels}
    arrays |= {"x_test": IMAGES.test.images, "y_test": IMAGES.test.labels}
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def finetune(npz, teacher, tmp_path_factory):
    """The command, and the checkpoint that it starts from."""
    path = save(tmp_path_factory.mktemp("student") / "checkpoint", width=0.2)
    return path, [
        *("finetune", str(path), "--data.source", npz, "--data.crop-padding", "1"),
        *("--data.no-flip", "--batch-size", "8", "--epochs", "3"),
        *("--steps-per-call", "2", "--optimizer.learning-rate", "0.2"),
        *("--teacher", str(teacher), "--distill-weight", "1"),
        *("--distill-temperature", "2", "--freeze", "conv1", "fc2/bias"),
    ]


@pytest.fixture(scope="module")
def finetuned(finetune, tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*finetune[1], "--workdir", str(workdir)]) == 0
    return workdir


@pytest.mark.slow
def test_finetuning_learns_the_teachers_answers(finetune, finetuned, teacher):
    arrays = final_arrays(finetuned)
    model, start = ij.load_checkpoint(finetune[0])
    before, after = flat(start["params"]), flat(arrays["variables"]["params"])
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == {"conv1/kernel", "conv1/bias", "fc2/bias"}
    # Nothing of the teacher, and momentum of what is trained alone.
    momentum = [leaf for leaf in jax.tree.leaves(arrays["training"]) if leaf.ndim]
    shapes = [value.shape for path, value in sorted(after.items()) if path not in same]
    assert [leaf.shape for leaf in momentum] == shapes
    assert arrays["variables"].keys() == start.keys()
    path = teacher / "checkpoints" / "step_00000007"
    config = json.loads((finetuned / "config.json").read_text())
    assert config["teacher"] == str(path)
    teaching, variables = ij.load_checkpoint(path)
    images = (IMAGES.train.images / 255 - 0.5) / 0.25
    answers = teaching.apply(variables, images)
    distance = [
        their_loss(model.apply({"params": params}, images), answers, 2.0).mean()
        for params in (start["params"], arrays["variables"]["params"])
    ]
    assert distance[1] < distance[0] / 2


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(finetune, finetuned, tmp_path, monkeypatch):
    command = [*finetune[1], "--workdir", str(tmp_path / "run"), "--resume"]
    stop_at(6, monkeypatch)  # in the second epoch of three
    assert main(command) == 0
    assert int(final_arrays(tmp_path / "run")["training"]["step"]) == 12
    monkeypatch.undo()
    assert main(command) == 0
    assert_bitwise_equal(final_arrays(tmp_path / "run"), final_arrays(finetuned))


def test_another_teacher_under_the_same_name_is_noticed(
    finetune, teacher, tmp_path, monkeypatch, capsys
):
    copy = pathlib.Path(shutil.copytree(teacher, tmp_path / "teacher"))
    command = [*finetune[1], "--workdir", str(tmp_path / "run"), "--resume"]
    command[command.index(str(teacher))] = str(copy)
    stop_at(1, monkeypatch)
    assert main(command) == 0
    checkpoint = copy / "checkpoints" / "step_00000007"
    shutil.rmtree(checkpoint)
    save(checkpoint, "resnet20", seed=2)
    before = sorted((tmp_path / "run").rglob("*"))
    assert main(command) == 2
    assert "another teacher than" in capsys.readouterr().err
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "nowhere"], "`teacher`: there is no checkpoint at nowhere"),
        (["--distill-weight", "0"], r"`distill_weight` (=0.0) must be in (0, 1]"),
        (["--distill-weight", "1.5"], r"`distill_weight` (=1.5) must be in (0, 1]"),
        (["--distill-temperature", "0"], "`distill_temperature` (=0.0) must be > 0"),
        (["--train-only", "fc3"], "`train_only` (='fc3') must match a parameter"),
        (["--freeze", "*"], "`freeze` (=('*',)) must leave a parameter to train"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "finetune"])
def test_errors_come_before_training(
    verb, arguments, message, finetune, npz, tmp_path, capsys
):
    path, _ = finetune
    start = ["fit", "--model.name", "lenet", "--data.mean", "0.5", "--data.std", "0.25"]
    start = start if verb == "fit" else ["finetune", str(path)]
    options = ["--data.source", npz, "--batch-size", "8", *arguments]
    assert main([*start, *options, "--workdir", str(tmp_path / "run")]) == 2
    *said, line = capsys.readouterr().err.strip().splitlines()
    assert message in line
    augmented = f"{path} does not say how its images were augmented"
    assert all(x == f"reading {npz}" or x.startswith(augmented) for x in said)
    assert not (tmp_path / "run").exists()
