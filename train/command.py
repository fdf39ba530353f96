"""Commands of this program, as the shell that started it takes them."""

import os
import pathlib
import shlex
import shutil
import sys

# The name of the program where it is installed.
INSTALLED = "inertia"


def is_installed_command() -> bool:
    """Returns whether the program was started as `inertia`."""
    return pathlib.Path(sys.argv[0]).name == INSTALLED


def program() -> str:
    """Returns the program's name in help: `inertia` or `python -m train`."""
    return INSTALLED if is_installed_command() else "python -m train"


def shell_command(*words: str | os.PathLike[str]) -> str:
    """Returns `inertia WORDS...` or `python -m train WORDS...`, quoted.

    It is the one by which this process was started. What an environment that was not
    activated has is named by its path.
    """
    if is_installed_command():
        start = [_as_found(os.path.abspath(sys.argv[0]), INSTALLED)]
    else:
        start = [_python(), "-m", "train"]
    return shlex.join([*start, *map(str, words)])


def install_command(extra: str) -> str:
    """Returns how an extra is installed, from the checkout if there is one."""
    checkout = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    pip = shlex.join([_python(), "-m", "pip", "install"])
    if checkout.is_file():
        return f"{pip} '.[{extra}]' in the checkout"
    return f"{pip} 'inertia_jax[{extra}]'"


def _python() -> str:
    return _as_found(sys.executable or "python", "python")


def _as_found(path: str, name: str) -> str:
    """Returns a program's name where the shell finds it by that, or else its path."""
    if shutil.which(name) == path:
        return name
    if pathlib.Path(path).is_relative_to(pathlib.Path.cwd()):
        return os.path.join(".", os.path.relpath(path))
    return path
