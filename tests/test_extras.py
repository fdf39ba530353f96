"""Each extra does its work with nothing installed but what it names."""

import importlib.metadata
import os
import pathlib
import subprocess
import sysconfig
import tomllib
import venv

import pytest
from conftest import ROOT, shared_file
from helpers import PREPARE, exact_cifar10
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(name, extra):
    """Yields what a distribution asks for, and what with an extra, `""` for none."""
    if name == PROJECT["name"]:
        extras = PROJECT["optional-dependencies"]
        lines = extras[extra] if extra else PROJECT["dependencies"]
    else:
        lines = importlib.metadata.requires(name) or []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def closure(extra):
    """Returns the names of all distributions that the project brings with an extra.

    Raises:
        PackageNotFoundError: One of them is not installed here.
    """
    wanted = [(PROJECT["name"], ""), (PROJECT["name"], extra)]
    found = set()
    while wanted:
        pair = wanted.pop()
        if pair not in found:
            found.add(pair)
            for asked in requirements(*pair):
                wanted.extend((asked.name, each) for each in ("", *asked.extras))
    return {name for name, _ in found} - {PROJECT["name"]}


class Environment:
    """A virtual environment of links to the installed files that an extra brings.

    Nothing is downloaded, and what another extra brings is not there.
    """

    def __init__(self, extra, folder):
        self.workdir = folder
        venv.create(folder / "venv", symlinks=True)
        base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
        site = pathlib.Path(sysconfig.get_path("purelib", vars=base))
        try:
            names = closure(extra)
        except importlib.metadata.PackageNotFoundError as error:
            pytest.skip(f"needs {error.name}: the extra `{extra}`")
        for name in names:
            for file in importlib.metadata.files(name):
                link = site / file
                if ".." not in file.parts and not link.exists():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.locate())
        hidden = ("JAX_", "XLA_", "PYTHON", "PYTEST_", "VIRTUAL_ENV")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        self.env |= {
            "PYTHONWARNINGS": "error",
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def run(self, *arguments):
        result = subprocess.run(
            [self.workdir / "venv" / "bin" / "python", *map(str, arguments)],
            cwd=self.workdir,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
        return result.stdout


LIBRARY = """
import importlib.util
import jax
import inertia_jax as ij
assert importlib.util.find_spec("tyro") is None, "the environment holds an extra"
model = ij.create_model("resnet20")
print(ij.count_cost(model, (32, 32, 3)).params)
images = jax.numpy.ones((2, 8, 8, 3))
layer = ij.InertialConv(4, 3, 4, reading="tiled")
print(layer.init_with_output(jax.random.key(0), images)[0].shape)
"""


@pytest.mark.slow
def test_the_library_computes_without_an_extra(tmp_path):
    params, *shape = Environment("", tmp_path).run("-c", LIBRARY).split()
    assert params == "269722"
    assert " ".join(shape) == "(2, 8, 8, 4)"


FIT = [
    "fit",
    *("--config", ROOT / "configs" / "quickstart.py"),
    *("--epochs", 1),
    *("--model.width", 0.03125),
]
# The program as `python -m train` runs it, and what JAX says of its cache.
COUNT_HITS = """
import collections, sys
import jax
from train.__main__ import main
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
assert main(sys.argv[1:]) == 0
requests = events["/jax/compilation_cache/compile_requests_use_cache"]
print("\\n", requests, events["/jax/compilation_cache/cache_hits"])
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    environment = Environment("train", tmp_path)
    for start in ("first", "second"):
        out = environment.run("-c", COUNT_HITS, *FIT, "--workdir", tmp_path / start)
        requests, hits = map(int, out.split()[-2:])
        assert requests > 10
        assert hits == (requests if start == "second" else 0)


@pytest.mark.slow
def test_tfds_trains_on_a_set_that_it_prepares(tmp_path):
    environment = Environment("tfds", tmp_path)
    cache = tmp_path / "data"
    environment.run("-c", PREPARE, tmp_path / "raw", "cifar10", cache)
    data = ["--data.source", "tfds:cifar10", "--data.cache-dir", cache]
    channels = ["--data.mean", *[0.5] * 3, "--data.std", *[0.25] * 3]
    out = environment.run(
        *("-m", "train", *FIT, *data, *channels, "--batch-size", 10),
        *("--workdir", tmp_path / "run"),
    )
    assert "checkpoint" in out


@pytest.mark.slow
def test_train_imports_weights_of_pytorch_without_it(tmp_path):
    environment = Environment("train", tmp_path)
    environment.run("-c", "import importlib.util as i; assert not i.find_spec('torch')")
    data = exact_cifar10(tmp_path)
    files = {
        "resnet20": ("resnet20_cifar10.pth", 933),
        "resnet32": ("resnet32-d509ac18.th", 944),
        "resnet56": ("resnet56-4bfd9763.th", 943),
    }
    for model, (file, correct) in files.items():
        environment.run(
            *("-m", "train", "import", shared_file(f"weights/{file}")),
            *("--model", model, "--out", tmp_path / model),
            *("--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225),
        )
        out = environment.run(
            *("-m", "train", "evaluate", tmp_path / model, "--data", data)
        )
        assert f"({correct} of 1,017)" in out


MAKE_WEIGHTS = """
import sys
import jax
import torch
import inertia_jax as ij
model = ij.create_model("resnet20", width=0.25)
state = ij.to_torch(model, ij.init_variables(model, jax.random.key(0)))
torch.save({k: torch.from_numpy(v.copy()) for k, v in state.items()}, sys.argv[1])
"""


# What the benchmarks compare with, besides PyTorch's training step.
COMPARED = """
import tensorly
import train.benchmark.torch_models
from tensorly.decomposition import partial_tucker
tensorly.set_backend("pytorch")
"""


@pytest.mark.slow
def test_torch_imports_weights_and_is_measured_beside(tmp_path):
    environment = Environment("torch", tmp_path)
    weights = tmp_path / "resnet20.pth"
    environment.run("-c", MAKE_WEIGHTS, weights)
    out = environment.run(
        *("-m", "train", "import", weights, "--out", tmp_path / "checkpoint"),
        *("--model", "resnet20", "--width", 0.25),
        *("--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25),
    )
    assert str(tmp_path / "checkpoint") in out
    environment.run("-c", COMPARED)
    out = environment.run(
        *("-m", "train", "benchmark", "--against", "torch", "--models", "resnet18"),
        *("--width", 0.03125, "--batch-size", 1, "--repeats", 1),
    )
    assert "JAX / PyTorch" in out


# Exports a network as ONNX, and runs the file.
TO_ONNX = """
import sys
import jax
import numpy as np
import onnxruntime
import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
model = ij.create_model("lenet")
variables = ij.init_variables(model, jax.random.key(0))
preprocessing = Preprocessing((28, 28, 1), (0.5,), (0.25,))
ij.save_checkpoint("lenet", model, variables, metadata=Metadata(preprocessing))
assert main(["export", "lenet", "--out", "lenet.onnx"]) == 0
session = onnxruntime.InferenceSession("lenet.onnx")
print(*session.run(None, {"images": np.zeros((3, 28, 28, 1), np.uint8)})[0].shape)
"""


@pytest.mark.slow
def test_onnx_exports_what_onnx_runtime_runs(tmp_path):
    environment = Environment("onnx", tmp_path)
    # PyTorch warns of its own code.
    environment.env["PYTHONWARNINGS"] = "default"
    assert environment.run("-c", TO_ONNX).endswith("\n3 10\n")


def test_dev_finds_every_test_and_its_tools(tmp_path):
    environment = Environment("dev", tmp_path)
    out = environment.run("-m", "pytest", "--collect-only", "-q", ROOT / "tests")
    assert "test_a_second_start_compiles_nothing" in out
    environment.run("-m", "mypy", "--version")
