"""The pages of the documentation, and the Python that stands on them."""

import importlib.util
import re

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]

# A block of Python, a cell of a notebook, or what a page needs but does not show, with
# the modules that it needs beside those of the extra `train`.
_PYTHON = re.compile(
    r"(?:^<!-- needs (?P<needs>[\w ]+) -->\n)?"
    r"^```(?:python|\{code-cell\}[^\n]*)\n(?P<shown>.*?)^```$"
    r"|^<!-- python(?: needs (?P<hidden_needs>[\w ]+))?\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def name_of(page):
    return str(page.relative_to(ROOT))


def has_python(page):
    return _PYTHON.search(page.read_text()) is not None


def python_of(page):
    """Returns the Python of a page, each line where it is on the page.

    Blocks that need what is not installed are left out.

    Returns:
        The code, and the names of modules that are not there.
    """
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    missing = set()
    for found in _PYTHON.finditer(text):
        kind = "shown" if found["shown"] is not None else "hidden"
        needs = (found["needs"] or found["hidden_needs"] or "").split()
        absent = {name for name in needs if importlib.util.find_spec(name) is None}
        missing |= absent
        if not absent:
            # The options of a notebook's cell are no Python.
            block = re.sub(r"^:[\w-]+:.*$", "", found[kind], flags=re.MULTILINE)
            start = text[: found.start(kind)].count("\n")
            code = block.split("\n")[:-1]
            lines[start : start + len(code)] = code
    return "\n".join(lines), missing


def run_python_of(page):
    """Runs the Python of a page.

    Returns:
        What it has defined, and the names of modules that were not there.
    """
    code, missing = python_of(page)
    defined = {"__name__": "__main__"}
    exec(compile(code, page, "exec"), defined)
    return defined, missing
