"""The wheel: the library alone, and it imports by itself."""

import ast
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


def test_the_wheel_holds_the_library_alone_and_imports(tmp_path, subprocess_env):
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
    assert tops == {"inertia_jax"}
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


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("inertia_jax", "train"), ("inertia_jax/ops", "flax")]
)
def test_imports_run_one_way(folder, forbidden):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        tops = {name.partition(".")[0] for name in imported(file)}
        assert forbidden not in tops, file
