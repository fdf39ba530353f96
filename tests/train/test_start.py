"""The start of a command: what is said, what is refused first, what is not done."""

import dataclasses
import importlib
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from helpers import (
    assert_bitwise_equal,
    compilations,
    make_config,
    save_bright_digits,
    synthetic_set,
)

import inertia_jax as ij
from inertia_jax.metadata import Metadata
from train.__main__ import VERBS, main
from train.benchmark.tucker import RULES, check_budgets
from train.command import shell_command
from train.config import Data, Model, Optimizer
from train.config_file import load_config
from train.errors import UsageError
from train.experiments.sweep import load_sweep
from train.fit.trainer import Trainer
from train.step.optimizer import make_optimizer
from train.step.state import Update, init_state, training_to_dict

pytestmark = pytest.mark.usefixtures("one_device")


def fail(*args, **kwargs):
    raise AssertionError("this was not to be called")


@pytest.fixture
def nothing_drawn_or_read(monkeypatch):
    def trace(model, key, *args):
        assert isinstance(key, jax.core.Tracer), "variables are drawn"
        return ij.init_variables(model, key, *args)

    monkeypatch.setattr("train.fit.initial.init_variables", trace)
    monkeypatch.setattr("train.fit.trainer.drawn_variables", fail)
    monkeypatch.setattr("train.fit.loop.load_configured", fail)


def make_trainer(**changes):
    config = dataclasses.replace(
        make_config(batch_size=16, **changes),
        data=Data(source="synthetic", mean=(0.5,), std=(0.25,)),
        model=Model("lenet", width=0.1),
        optimizer=Optimizer(ema_decay=0.5),
    )
    return Trainer(config, synthetic_set(8, 1), jax.devices()[:1])


def test_a_checkpoint_is_gone_on_with_and_nothing_is_drawn(
    tmp_path, nothing_drawn_or_read, monkeypatch
):
    trainer = make_trainer()
    with compilations() as compiled:
        template = trainer.abstract_state()
    assert compiled == []
    kinds = {type(leaf) for leaf in jax.tree.leaves(template)}
    assert kinds == {jax.ShapeDtypeStruct}
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), template)
    arrays = {"variables": state.result, "training": training_to_dict(state)}
    restored = trainer.restore(template, arrays)
    assert_bitwise_equal(jax.device_get(restored), state)

    path, metadata = tmp_path / "saved", Metadata(trainer.preprocessing)
    ij.save_checkpoint(path, trainer.model, state.variables, metadata=metadata)
    first = make_trainer(init=str(path)).init_state()
    assert_bitwise_equal(jax.device_get(first.variables), state.variables)
    assert_bitwise_equal(jax.device_get(first.averages), state.variables)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first.opt_state))


@pytest.mark.parametrize("name", ["sgd", "adadelta"])
@pytest.mark.parametrize(
    "schedule", ["multistep", "cosine", "exponential", "one_cycle"]
)
@pytest.mark.parametrize("decays_all", [True, False])
def test_the_optimisers_first_state_is_its_own(name, schedule, decays_all):
    optimizer = Optimizer(name=name, schedule=schedule, decay_norm_and_bias=decays_all)
    tx = make_optimizer(optimizer, steps_per_epoch=3, epochs=300)
    variables = {"params": {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    state = init_state(ij.create_model("lenet"), Update(tx), variables)
    assert_bitwise_equal(state.opt_state, tx.init(variables["params"]))


@pytest.mark.slow
def test_a_run_says_what_it_does(tmp_path, capsys):
    source = save_bright_digits(tmp_path / "set.npz", 32, 8, 8)
    options = ["--data", source, "--data.mean", "0.5", "--data.std", "0.25"]
    options += ["--model.name", "lenet", "--model.width", "0.1", "--epochs", "1"]
    options += ["--batch-size", "16", "--optimizer.schedule", "cosine"]
    assert main(["fit", *options, "--workdir", str(tmp_path / "a run")]) == 0
    said = capsys.readouterr()
    places = [
        said.err.index(words)
        for words in (
            f"reading {source}",
            "starting lenet from random weights",
            "compiling",
        )
    ]
    assert places == sorted(places)
    (line,) = [line for line in said.out.splitlines() if line.startswith("evaluate ")]
    python, *words = shlex.split(line.removeprefix("evaluate "))
    assert pathlib.Path(shutil.which(python)).samefile(sys.executable)
    assert words == ["-m", "train", "evaluate", str(tmp_path / "a run")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--model.name", "resent18"],
            "`model.name` (='resent18')",
        ),
        (["--model.name", "vgg61"], "Did you mean vgg16?"),
        (["--model.plan", ij.Plan((("conv9", ij.Conv()),)).to_json()], "conv9"),
        (["--model.width", "-1"], "`width` (=-1.0)"),
        (
            ["--model.name", "lenet", "--model.stem", "imagenet"],
            "must be cifar for lenet",
        ),
    ],
)
def test_a_network_is_refused_before_data_are_read(
    options, words, nothing_drawn_or_read, tmp_path, capsys
):
    assert main(["fit", *options, "--workdir", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_file_of_configurations_is_answered_alike(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from train.config import Config, Model\n"
        "config = Config(model=Model(name='resnet81'))\n"
    )
    with pytest.raises(UsageError, match="Did you mean resnet18"):
        load_config(file)


@pytest.mark.parametrize(
    "name", ["mnist_lenet", "mnist_lenet.py", "configs/mnist_lenet.py"]
)
def test_a_configuration_of_the_program_is_found_by_its_name(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).model.name == "lenet"
    sweep = load_sweep(pathlib.Path("mnist_inertial"))
    assert (
        sweep.configs == load_sweep(ROOT / "configs/sweeps/mnist_inertial.py").configs
    )
    # What lies here is meant first.
    (tmp_path / "mnist_lenet").write_text("")
    with pytest.raises(UsageError, match="must be a Python file|must define"):
        load_config("mnist_lenet")


def test_a_configuration_that_is_nowhere_is_answered_with_the_near_one():
    with pytest.raises(UsageError, match="Did you mean cifar10_resnet18?"):
        load_config("cifar10_resent18")
    with pytest.raises(UsageError, match="no config file at elsewhere/mnist_lenet"):
        load_config("elsewhere/mnist_lenet")


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["fitt"], "fit"),
        (["bench"], "benchmark"),
        (["quick-start"], "quickstart"),
        (["benchmark", "--suite", "infre"], "infer"),
        (["benchmark", "--suite", "start"], "startup"),
    ],
)
def test_a_misspelt_verb_or_suite_is_answered_with_the_near_one(argv, near, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert f"Did you mean {near}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["fit", "--epoch", "3"], "--epochs"),
        (["fit", "--batchsize", "3"], "--batch-size"),
        (["predict", "run", "x.png", "--tops", "3"], "--top"),
        (["fit", "--model.nmae", "lenet"], "--model.name"),
        (["evaluate", "runs/x", "--flip-tset"], "--flip-test"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_near_one(argv, near, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    said = capsys.readouterr()
    assert near in said.err + said.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fit", "--data", "digit"], "Did you mean digits?"),
        (
            ["compress", "x", "--out", "y", "--ranks", "evbmf", "--device", "v5"],
            "Did you mean v5p?",
        ),
        (["fit", "--data", "image_folder:x"], "Did you mean imagefolder?"),
        (["fit", "--data", "tdfs:cifar10"], "Did you mean tfds?"),
        (["compress", "x", "--ranks", "bugdet:macs=0.5", "--out", "y"], "mean budget?"),
        (
            ["compress", "x", "--out", "y"],
            "or --macs or --latency (for inertial layers) must be given.",
        ),
        (
            ["compress", "x", "--out", "y", "--ranks", "ratio:0.2", "--macs", "0.5"],
            "only one of `ranks` (=ratio:0.2) and `macs` (=0.5) may be given.",
        ),
        (["pipeline"], "`file` must be given"),
    ],
)
def test_words_say_what_happened(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["infer", "tucker"])
def test_a_suite_checks_its_budgets_first(suite, monkeypatch, capsys):
    module = importlib.import_module(f"train.benchmark.{suite}")
    monkeypatch.setattr(module, "init_variables", fail)
    assert main(["benchmark", "--suite", suite, "--width", "0.0625"]) == 2
    said = capsys.readouterr().err
    assert "`width` (=0.0625) is too small for this suite" in said


@pytest.mark.slow
def test_budgets_are_judged_as_compress_judges_them():
    rng = np.random.default_rng(0)
    for width, is_refused in ((0.75, True), (1.0, False)):
        model = ij.create_model("resnet20", width=width)
        shapes = jax.eval_shape(lambda m=model: ij.init_variables(m, jax.random.key(0)))
        variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), shapes)
        rules = [
            rule for rule in RULES.values() if isinstance(rule["ranks"], ij.Budget)
        ]
        if is_refused:
            with pytest.raises(UsageError, match="still takes 0.3") as ours:
                check_budgets(model, RULES)
            with pytest.raises(ValueError, match="must be at least 0.3") as its:
                for rule in rules:
                    ij.compress(model, variables, **rule)
            least = [
                re.findall(r"(?:least|takes) (0\.\d+)", str(e.value))
                for e in (ours, its)
            ]
            assert float(least[0][0]) == pytest.approx(float(least[1][0]), abs=1e-3)
        else:
            check_budgets(model, RULES)
            for rule in rules:
                ij.compress(model, variables, **rule)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "import"])
def test_without_the_extra_a_verb_is_answered_in_a_sentence(verb, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    for room in ("options", "verbs"):
        monkeypatch.delitem(sys.modules, f"train.{room}.{verb}", raising=False)
    assert main([verb, "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: `{verb}` needs the package tyro")
    assert "pip install '.[train]' in the checkout" in line


def test_without_jax_the_program_is_one_sentence_too():
    # Without `site`, Python finds no package.
    command = [sys.executable, "-S", "-m", "train", "fit"]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    *_, line = found.stderr.splitlines()
    assert re.match(r"error: `fit` needs the package (flax|jax|numpy), ", line)


# A program: prints which of these packages the help of a verb has imported.
HELP = """
import contextlib, io, sys
from train.__main__ import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main([sys.argv[1], "--help"])
heavy = ("jax", "jaxlib", "flax", "optax", "orbax", "scipy", "matplotlib", "torch")
print(*(name for name in heavy if name in sys.modules))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_that_computes(verb):
    command = [sys.executable, "-c", HELP, verb]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []


def test_versions_are_said(capsys):
    assert main(["--version"]) == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert found["inertia_jax"] == ij.__version__
    assert found["jax"] == jax.__version__
    assert found["flax"] == flax.__version__
    assert found["python"] == platform.python_version()


def test_a_defect_of_our_own_is_no_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "train.verbs.report", None)
    with pytest.raises(ModuleNotFoundError, match="train.verbs.report"):
        main(["report", "x"])


def test_commands_name_the_interpreter_as_the_shell_finds_it(tmp_path, monkeypatch):
    place = tmp_path / "my env" / "bin"
    place.mkdir(parents=True)
    (place.parent / "lib").mkdir()
    python = place / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(place.parent / "lib")
    command = shell_command("evaluate", pathlib.Path("runs/a b"), "--flip-test")
    words = ["-m", "train", "evaluate", "runs/a b", "--flip-test"]
    assert shlex.split(command) == [str(python), *words]
    for where, name in ((tmp_path, "./my env/bin/python"), (place, "./python")):
        monkeypatch.chdir(where)
        assert shlex.split(shell_command("fit"))[0] == name
    monkeypatch.setenv("PATH", str(place))
    assert shell_command("fit", "--epochs", "3") == "python -m train fit --epochs 3"


def test_commands_of_the_installed_program_name_it_as_the_shell_finds_it(
    tmp_path, monkeypatch
):
    program = tmp_path / "bin" / "inertia"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "fit"])
    monkeypatch.chdir(tmp_path)
    assert shell_command("evaluate", "x") == "./bin/inertia evaluate x"
    monkeypatch.setenv("PATH", str(program.parent))
    assert shell_command("evaluate", "x") == "inertia evaluate x"
