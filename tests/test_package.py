"""The wheel holds library and program, and what is imported is declared."""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_wheel_holds_library_and_program_and_both_run(tmp_path, subprocess_env):
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "-w", str(tmp_path)]
    options = ["--no-deps", "--no-build-isolation", "-q"]
    built = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    tops = {p.name for p in (tmp_path / "site").iterdir() if "dist-info" not in p.name}
    assert tops == {"inertia_jax", "train"}
    (entry,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "inertia = train.__main__:run_command" in entry.read_text()
    tracked = subprocess.run(
        ["git", "ls-files", "inertia_jax", "train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.split():
        assert (tmp_path / "site" / name).exists(), name
    for folder in ("", "pipelines", "sweeps"):
        names = {file.name for file in (ROOT / "configs" / folder).glob("*.py")}
        there = tmp_path / "site" / "train" / "configs" / folder
        assert names and names <= {file.name for file in there.iterdir()}
    code = (
        "import inertia_jax as ij; print(ij.__file__); "
        "print(ij.count_cost(ij.create_model('resnet20'), (32, 32, 3)).params)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**subprocess_env, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    place, params = result.stdout.split()
    assert place.startswith(str(tmp_path))
    assert params == "269722"
    # The command, as pip makes it, from a folder with a module of the same name.
    command = tmp_path / "inertia"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom train.__main__ import run_command\n"
        f"sys.exit(run_command())\n"
    )
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "train.py").write_text("raise SystemExit('not this')")
    options = ["fit", "--config", "mnist_lenet", "--no-huge-pages", "--help"]
    shown = subprocess.run(
        [sys.executable, command, *options],
        env={**subprocess_env, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: inertia fit" in shown.stdout
    assert "(default: lenet)" in shown.stdout


# Nodes whose bodies run when they are called, not when the module is imported.
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def imported(file, *, nested=True):
    """Yields the modules that a file imports, `nested` in functions or not."""
    nodes = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Call) and node.args:
            # `importlib.import_module("name")`
            is_import = getattr(node.func, "attr", "") == "import_module"
            if is_import and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value
        if nested or not isinstance(node, FUNCTIONS):
            nodes.extend(ast.iter_child_nodes(node))


def test_operations_do_not_know_flax():
    files = list((ROOT / "inertia_jax" / "ops").rglob("*.py"))
    assert files
    for file in files:
        assert "flax" not in {name.partition(".")[0] for name in imported(file)}, file


def rooms(package):
    """Returns the files and folders of a package, as docs/architecture.md has them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split(f"\n    {package}/\n")[1].split("\n\n")[0]
    names = re.findall(r"^ {6}(\w+)(?:/|\.py) ", tree, re.MULTILINE)
    places = (ROOT / package).iterdir()
    there = {p.stem for p in places if p.suffix == ".py" or list(p.glob("*.py"))}
    assert set(names) == there - {"__init__"}
    return names


@pytest.mark.parametrize("package", ["inertia_jax", "train"])
def test_imports_run_one_way(package):
    order = rooms(package)
    for file in (ROOT / package).rglob("*.py"):
        room = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in imported(file):
            top, *rest = name.split(".")
            assert package == "train" or top != "train", file
            if top == package and rest and room != "__init__":
                assert order.index(rest[0]) <= order.index(room), (file, name)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    """Returns the distributions that pyproject.toml names: the core's and these."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lists = [project["dependencies"], *(optional[extra] for extra in extras)]
    names = {re.match(r"[\w.-]+", line)[0] for lines in lists for line in lines}
    return {canonical(name) for name in names}


def undeclared(files, distributions, *, nested):
    """Returns the third-party modules among the imports that none of them brings."""
    ours = {"inertia_jax", "train", *sys.stdlib_module_names}
    installed = importlib.metadata.packages_distributions()
    tops = {
        name.partition(".")[0]
        for file in files
        for name in imported(file, nested=nested)
    }
    assert tops & {"jax", "torch"}
    # A package that is not installed here is taken to be named as its module is.
    return {
        top
        for top in tops - ours
        if distributions.isdisjoint(map(canonical, installed.get(top, [top])))
    }


def test_the_library_imports_with_its_own_dependencies():
    files = (ROOT / "inertia_jax").rglob("*.py")
    assert undeclared(files, declared(), nested=False) == set()


def test_the_training_program_starts_with_the_extra_train():
    # PyTorch's networks are the one file that needs PyTorch to be imported.
    files = set((ROOT / "train").rglob("*.py"))
    files -= set((ROOT / "train").rglob("torch_models.py"))
    assert undeclared(files, declared("train"), nested=False) == set()


@pytest.mark.parametrize("folder", ["inertia_jax", "train"])
def test_every_import_is_of_a_declared_dependency(folder):
    files = (ROOT / folder).rglob("*.py")
    distributions = declared("train", "tfds", "torch", "onnx", "openvino", "wandb")
    assert undeclared(files, distributions, nested=True) == set()


def test_tests_import_what_the_extras_bring():
    helpers = {canonical(file.stem) for file in (ROOT / "tests").rglob("*.py")}
    extras = ("train", "tfds", "torch", "onnx", "int8", "dev", "mutants")
    distributions = declared(*extras) | helpers
    files = (ROOT / "tests").rglob("*.py")
    assert undeclared(files, distributions, nested=True) == set()


@pytest.mark.parametrize("package", ["inertia_jax", "ops", "plan", "models"])
def test_names_that_are_imported_late_are_those_that_type_checkers_see(package):
    name = package if package == "inertia_jax" else f"inertia_jax.{package}"
    module = importlib.import_module(name)
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in block.body
        for alias in node.names
    }
    assert sorted(seen) == sorted(module.__all__)
    # Asked anew: what was asked for before lies in the module itself.
    found = {name: module.__getattr__(name) for name in module.__all__}
    assert all(found[name] is seen[name] for name in seen)
    assert not hasattr(module, "no_such_name")


def test_the_library_is_imported_when_it_is_used():
    code = (
        "import sys, inertia_jax as ij; assert not {'jax', 'flax'} & {*sys.modules}; "
        "ij.checkpoint.load_arrays; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
