"""Tries a wheel and a sdist in clean environments of each Python that they are for.

    python .ci/try_release.py dist

The wheel is installed with the extra `train`, and the sdist alone. Both compute, and
the program trains. Other extras are resolved, but not installed. A Python that this
machine lacks is named, and left out.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")

COMPUTES = """
import importlib.metadata, pathlib, sys
import jax
import inertia_jax as ij

assert sys.prefix in ij.__file__, ij.__file__
assert ij.__version__ == importlib.metadata.version("inertia_jax") == sys.argv[1]
assert (pathlib.Path(ij.__file__).parent / "py.typed").is_file()
model = ij.create_model("resnet20", width=0.25)
variables = ij.init_variables(model, jax.random.key(0))
small, factors = ij.compress(model, variables, ranks=ij.Budget(macs=0.7))
logits = small.apply(factors, jax.numpy.ones((1, 32, 32, 3)), train=False)
assert logits.shape == (1, 10) and bool(jax.numpy.isfinite(logits).all())
"""

TRAINS = ["fit", "--config", "quickstart", "--epochs", "1", "--model.width", "0.03125"]


def main() -> int:
    """Tries all, and returns the exit code: 1 where one fails or no Python is there."""
    (wheel,) = pathlib.Path(sys.argv[1]).resolve().glob("*.whl")
    (sdist,) = pathlib.Path(sys.argv[1]).resolve().glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    found = {name: find_python(name) for name in PYTHONS}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    first = True
    for name, python in found.items():
        if python is None:
            print(f"Python {name}: not found, left out", flush=True)
            continue
        with Environment(python) as environment:
            environment.pip("install", f"{wheel}[train]")
            environment.pip("check")
            environment.run("python", "-c", COMPUTES, version)
            said = environment.run("inertia", "--version")
            if version not in said:
                raise SystemExit(f"inertia --version says {said}, and not {version}.")
            environment.run("inertia", *TRAINS)
            if first:
                for extra in sorted(extras):
                    environment.pip("install", "--dry-run", f"{wheel}[{extra}]")
        with Environment(python) as environment:
            environment.pip("install", sdist)
            environment.run("python", "-c", COMPUTES, version)
        resolved = f"; extras {', '.join(sorted(extras))} resolve" if first else ""
        print(f"Python {name}: wheel[train] and sdist work{resolved}", flush=True)
        first = False
    return 1 if first else 0


def find_python(name: str) -> str | None:
    """Returns an interpreter of a version, of the path or of pyenv."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    there = pyenv.glob(f"versions/{name}.*/bin/python")
    for place in [
        shutil.which(f"python{name}"),
        *sorted(map(str, there), reverse=True),
    ]:
        # A shim of pyenv is there for every version, and may have none to start.
        asked = [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if place is None:
            continue
        said = subprocess.run(asked, capture_output=True, text=True, check=False)
        if said.stdout.strip() == name:
            return place
    return None


class Environment:
    """A virtual environment, and a folder to work in, which go with the `with`."""

    def __init__(self, python: str) -> None:
        """Takes the interpreter that the environment is made with."""
        self._python = python

    def __enter__(self) -> "Environment":
        self._folder = tempfile.TemporaryDirectory()
        self._path = pathlib.Path(self._folder.name)
        subprocess.run([self._python, "-m", "venv", self._path / "venv"], check=True)
        # Neither this checkout nor its settings are seen from there.
        hidden = ("PYTHON", "JAX_", "XLA_", "VIRTUAL_ENV")
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def pip(self, *words: object) -> None:
        """Runs pip, whose warnings do not matter here."""
        self.run("python", "-m", "pip", "-q", *words)

    def run(self, program: str, *words: object) -> str:
        """Runs a program of the environment, and returns what it prints.

        Raises:
            SystemExit: It fails; its output is shown.
        """
        done = subprocess.run(
            [self._path / "venv" / "bin" / program, *map(str, words)],
            cwd=self._path,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(
                f"{done.stdout[-5000:]}\n{self._python}: {program} {words}"
            )
        return done.stdout


if __name__ == "__main__":
    sys.exit(main())
