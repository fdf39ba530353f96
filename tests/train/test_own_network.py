"""Networks of the user's own, which a function makes."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers import FIT_ONE, evaluate, flat, save_bright_digits
from own_cnn import OwnCNN

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.compress import accuracy
from train.config import Config, Model
from train.errors import UsageError
from train.evaluate.evaluation import Evaluation
from train.experiments.pipeline_config import Pipeline
from train.machine.parallel import AXIS, Parallel
from train.networks import (
    NetworkDescription,
    check_model,
    make_model,
    model_config,
    open_description,
    read_network,
    with_classes,
    with_dtype,
)
from train.options import fit
from train.run.checkpoints import find_checkpoint

FACTORY = "own_cnn:make"
SHAPE = (8, 8, 1)
GATED = ij.Plan(
    (
        (
            "Conv_1",
            ij.Inertial(3, 4, reading="tiled", relative=True, threshold=ij.Rate(0.5)),
        ),
    )
)


def own(plan=GATED, factory=FACTORY, **options):
    config = Model(factory=factory, plan=plan.to_json(), **options)
    return make_model(config, num_classes=3, image_shape=SHAPE)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_devices_take_the_batch_together():
    """BatchNorm, the mean friction and the quantile are those of the whole batch."""
    model = own()
    x = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)

    def moved(variables, x, axis_name=None):
        one = model.clone(axis_name=axis_name)
        rngs = {"dropout": jax.random.key(1)}
        collections = ["batch_stats", "thresholds"]
        return one.apply(variables, x, train=True, mutable=collections, rngs=rngs)[1]

    whole = jax.jit(moved)(variables, x)
    parallel = Parallel("shard_map", tuple(jax.devices()[:2]))
    call = parallel.wrap(lambda v, x: moved(v, x, AXIS), (False, True))
    halves = call(
        parallel.replicate(variables), parallel.spread(x.reshape(2, 2, *SHAPE))
    )
    expected, found = flat(whole), flat(halves)
    assert expected.keys() == found.keys() and "thresholds/Conv_1/threshold" in found
    for place, value in expected.items():
        np.testing.assert_allclose(
            found[place], value, rtol=1e-5, atol=1e-8, err_msg=place
        )
        assert not np.array_equal(value, flat(variables)[place]), place


def test_a_configuration_makes_it_again():
    model = own()
    config = model_config(model)
    assert config == Model(factory=FACTORY, plan=GATED.to_json())
    assert make_model(config, num_classes=3) == model
    assert config == Model(**dataclasses.asdict(config))
    assert with_classes(model, 5).unplanned == OwnCNN(5, [8, 8])
    assert with_classes(model, 5).plan == GATED
    assert with_dtype(model, np.float32) is model
    with pytest.raises(ValueError, match="OwnCNN has no field `dtype`"):
        with_dtype(model, jax.numpy.bfloat16)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("own_cnn", "must be MODULE:FUNCTION"),
        ("no_such.net:make", "there is no module no_such in /"),
        ("own_cnn.py:make", "must name a module, not a file: own_cnn:make.$"),
        ("./nets/own_cnn.py:make", "not a file: nets.own_cnn:make.$"),
        ("nets/own_cnn:make", "not a file: nets.own_cnn:make.$"),
        ("/elsewhere/own_cnn.py:make", "not a file: own_cnn:make.$"),
        ("own_exit:make", r"/own_exit\.py, line \d+: SystemExit: usage: own_exit\.$"),
        ("own_cnn:make_exit", r"/own_cnn\.py, line \d+: SystemExit: 3\.$"),
        ("own_cnn:mak", r"own_cnn\.py has no function mak. Did you mean make"),
        ("own_cnn:make_number", r"must return a flax\.linen\.Module; got"),
        ("own_cnn:OwnCNN", "with num_classes=3: TypeError: .*unexpected keyword"),
        ("own_cnn:make_none", r"/own_cnn\.py, line \d+: KeyError: 'oops'\.$"),
        ("own_cnn:make_two", "it returns a tuple; must be one array of logits"),
        ("own_cnn:make_map", r"returns shape \(1, 8, 8, 3\) .* must be \(1, 3\)"),
        ("own_cnn:make_flat", r"\(1, 8, 8, 1\): /.*/own_cnn\.py, line \d+: TypeErr"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused_in_one_line(factory, message):
    with pytest.raises(UsageError, match=message) as caught:
        own(ij.Plan(), factory=factory)
    assert str(caught.value).startswith(f"`model.factory` (={factory})")
    assert "\n" not in str(caught.value)


def test_options_of_other_networks_are_refused():
    assert main(["fit", "--model.factory", FACTORY, "--model.width", "2"]) == 2
    with pytest.raises(UsageError, match="there is no module"):
        check_model(Model(factory="no_such:make"))
    none = ij.Plan((("conv9", ij.Tucker2(1, 1)),))
    with pytest.raises(UsageError, match="'conv9', which matches no convolution"):
        own(none)
    large = ij.Plan((("*", ij.Inertial(5, 6)),))
    with pytest.raises(UsageError, match="`plan` does not stand at 2 layers"):
        own(large, strict=True)


def parsed(tmp_path, model, *options):
    """Returns the network of a file's `Model` with options."""
    file = tmp_path / "mine.py"
    lines = ("from train.config import *", f"config = Config(model=Model({model}))")
    file.write_text("\n".join(lines))
    return fit.parse(["--config", str(file), *options]).run.model


@pytest.mark.parametrize("model", ["", "name='lenet'", "factory='a:make'"])
def test_a_factory_is_given_over_what_a_file_has(tmp_path, model):
    found = parsed(tmp_path, model, "--model.factory", FACTORY)
    assert found.factory == FACTORY
    config = Config(model=found)
    assert dataclasses.replace(config.model, factory="a:make").factory == "a:make"


def test_a_name_is_given_in_place_of_a_factory_alone(tmp_path):
    message = r"`model.name` \(=%s\) does nothing with `model.factory` \(=a:make\)"
    for name, words in [
        ("vgg16", ["--model.name", "vgg16"]),
        ("resnet18", ["--model.name", "resnet18"]),  # the default
        ("resnet18", ["--model.name=resnet18"]),
    ]:
        with pytest.raises(UsageError, match=message % name):
            parsed(tmp_path, "factory='a:make'", *words)
        with pytest.raises(UsageError, match=message % name):
            parsed(tmp_path, "", *words, "--model.factory", "a:make")
    none = ["--model.factory", "None"]
    assert parsed(tmp_path, "factory='a:make'", *none) == Model()
    words = ["--model.name", "lenet", *none]
    assert parsed(tmp_path, "factory='a:make'", *words) == Model("lenet")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_checkpoint_says_what_makes_its_network(tmp_path, capsys):
    source = save_bright_digits(tmp_path / "digits.npz", 64, 20, 8)
    run = tmp_path / "run"
    options = [
        "--data.source",
        source,
        "--workdir",
        str(run),
        "--model.factory",
        FACTORY,
    ]
    arguments = [*FIT_ONE[: FIT_ONE.index("--model.name")], *options]
    assert main(arguments) == 0
    assert f"starting {FACTORY} from random weights" in capsys.readouterr().err
    network = read_network(next((run / "checkpoints").iterdir()))
    assert network.model.unplanned == OwnCNN(10, [8, 8])
    assert network.model.factory == FACTORY
    before = evaluate(run, tmp_path)
    # A checkpoint of one's own training says nothing of a function.
    alone = tmp_path / "alone"
    kept = (("Conv_0", "is the first one"),)
    model = ij.Planned(network.model.unplanned, kept=kept)
    ij.save_checkpoint(alone, model, network.variables, metadata=network.metadata)
    with pytest.raises(UsageError, match=r"own_cnn\.OwnCNN and does not say what mak"):
        open_description(alone)
    assert main(["finetune", str(alone), "--model.factory", "None"]) == 2
    assert "own_cnn.OwnCNN and does not say what makes it" in capsys.readouterr().err
    out = str(tmp_path / "evaluation.json")
    words = ["evaluate", str(alone), "--model.factory", FACTORY, "--out", out]
    assert main(words) == 0
    assert json.loads(pathlib.Path(out).read_text())["top1"] == before["top1"]
    with pytest.raises(UsageError, match="is not of `model.factory` .*BatchNorm_1"):
        read_network(alone, factory="own_cnn:make_wide")
    # Nor does it beside a network that is given its function.
    assert main([*words, "--against", str(alone)]) == 0
    assert json.loads(pathlib.Path(out).read_text())["difference"] == 0
    file = tmp_path / "mine.py"
    lines = ("from train.config import *", "config = Config(model=Model('lenet'))")
    file.write_text("\n".join(lines))
    beside = ["--config", str(file), "--init", str(alone), "--teacher", str(alone)]
    beside += ["--workdir", str(tmp_path / "beside")]
    assert main([*arguments, *beside]) == 0
    # The reasons why layers stayed go with the network.
    assert read_network(find_checkpoint(tmp_path / "beside")).model.kept == kept


@pytest.mark.parametrize("factory", [None, "no_such:make"])
def test_a_checkpoint_is_read_as_the_network_beside_it(tmp_path, factory, capsys):
    model = own(ij.Plan())
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)
    mine = model.unplanned if factory is None else model.clone(factory=factory)
    path = tmp_path / "mine"
    names = ("a", "b", "c")
    metadata = Metadata(Preprocessing(SHAPE, (0.5,), (0.25,)), names, {})
    ij.save_checkpoint(path, mine, variables, metadata=metadata)
    with pytest.raises(UsageError, match="--model.factory MODULE:FUNCTION"):
        read_network(path)
    assert read_network(path, fallback=FACTORY).model == model
    said = f"there is no module no_such in {os.getcwd()}"
    assert (said in capsys.readouterr().err) == (factory is not None)
    # A network of the library needs none.
    library = tmp_path / "library"
    lenet = ij.create_model("lenet", width=0.1, num_classes=3)
    shape = (32, 32, 1)
    variables = ij.init_variables(lenet, jax.random.key(0), shape)
    metadata = Metadata(Preprocessing(shape, (0.5,), (0.25,)), names, {})
    ij.save_checkpoint(library, lenet, variables, metadata=metadata)
    assert read_network(library, fallback=FACTORY).model == lenet


def test_stages_are_evaluated_whatever_fields_a_network_has(monkeypatch):
    """Equal models share a program; those that cannot be compared have their own."""
    made = []

    def evaluator_for(network, source, settings):
        made.append(network.model)
        return lambda variables: object.__new__(Evaluation)

    monkeypatch.setattr(accuracy, "evaluator_for", evaluator_for)
    lists = [OwnCNN(3, [8, 8]), OwnCNN(3, [8, 8]), OwnCNN(3, [8, 9])]
    arrays = [OwnCNN(3, np.array([8, 8])), OwnCNN(3, np.array([8, 8]))]
    processing = Preprocessing(SHAPE, (0.5,), (0.25,))
    path = pathlib.Path("mine")
    description = NetworkDescription(path, lists[0], processing, (), {})
    evaluate = accuracy.stage_evaluator(
        description=description, sources=["digits"], cache_dir=""
    )
    evaluate({str(i): (model, {}) for i, model in enumerate((*lists, *arrays))})
    assert [id(model) for model in made] == [
        id(model) for model in (lists[0], lists[2], *arrays)
    ]


def test_a_pipeline_and_a_benchmark_take_none(capsys):
    with pytest.raises(UsageError, match=r"`run.model.factory` \(=own_cnn:make\) must"):
        Pipeline(Config(model=Model(factory=FACTORY)))
    assert main(["benchmark", f"--model.factory={FACTORY}"]) == 2
    assert "--suite loop --config FILE times a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_it_is_compressed_fine_tuned_made_inertial_and_exported(tmp_path):
    source = save_bright_digits(tmp_path / "digits.npz", 128, 20, 8)
    run, small, gated = (str(tmp_path / name) for name in ("run", "small", "gated"))
    images = ["--calibration-images", "32", "--recalibration-images", "64"]
    tuned = ["--epochs", "1", "--batch-size", "16"]
    common = FIT_ONE[: FIT_ONE.index("--model.name")]
    for words in (
        [*common, "--data", source, "--workdir", run, "--model.factory", FACTORY],
        ["compress", run, "--ranks", "ratio:0.5", "--out", small, *images],
        ["finetune", small, "--workdir", f"{small}_run", "--teacher", run, *tuned],
        ["compress", run, "--macs", "0.9", "--out", gated, *images],
        ["finetune", gated, "--workdir", f"{gated}_run", *tuned],
        ["evaluate", f"{gated}_run", "--against", f"{small}_run"],
        ["export", f"{small}_run", "--out", f"{small}.ijx", "--platforms", "cpu"],
        ["report", f"{gated}_run"],
    ):
        assert main(words) == 0, words
    # A checkpoint that says nothing of a function is the teacher of what it becomes.
    network = read_network(find_checkpoint(run))
    alone, out = str(tmp_path / "alone"), str(tmp_path / "out")
    model = network.model.unplanned
    ij.save_checkpoint(alone, model, network.variables, metadata=network.metadata)
    words = ["compress", alone, "--model.factory", FACTORY, "--ranks", "ratio:0.5"]
    words += [*images, "--finetune-epochs", "1", "--out", out]
    assert main(words) == 0
    network = read_network(tmp_path / "small")
    assert {type(spec) for _, spec in network.model.plan.rules} == {ij.Tucker2}
    # The reasons why layers stayed go with the network, also when a run is resumed.
    kept, told, tuned_run = (("Conv_0", "is it"),), tmp_path / "told", tmp_path / "t"
    model = network.model.clone(kept=kept)
    ij.save_checkpoint(told, model, network.variables, metadata=network.metadata)
    words = ["finetune", str(told), "--workdir", str(tuned_run), *tuned]
    assert main([*words, "--checkpoint-steps", "4"]) == 0
    shutil.rmtree(max((tuned_run / "checkpoints").iterdir()))
    assert main([*words, "--checkpoint-steps", "4", "--resume"]) == 0
    assert read_network(find_checkpoint(tuned_run)).model.kept == kept
    path = next((tmp_path / "gated_run" / "checkpoints").iterdir())
    assert ij.load_checkpoint(path, model=OwnCNN(10, [8, 8]))[0].plan.inertial
    assert Config().model.factory is None
    network = ij.load_exported(f"{small}.ijx")
    assert network(np.zeros((2, *SHAPE), np.uint8)).shape == (2, 10)
