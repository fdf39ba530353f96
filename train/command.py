"""Commands of this program, as the shell that started it takes them."""

import os
import pathlib
import shlex
import shutil
import sys


def shell_command(*words: str | os.PathLike[str]) -> str:
    """Returns `python -m train WORDS...`, quoted, with the interpreter of this process.

    An environment that was not activated has its interpreter named by its path.
    """
    python = sys.executable or "python"
    if shutil.which("python") == python:
        python = "python"
    elif pathlib.Path(python).is_relative_to(pathlib.Path.cwd()):
        python = os.path.join(".", os.path.relpath(python))
    return shlex.join([python, "-m", "train", *map(str, words)])
