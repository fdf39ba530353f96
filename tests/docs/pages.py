"""The pages of the documentation, and the Python that stands on them."""

import re

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]

# A block of Python, a cell of a notebook, or what a page needs but does not show.
_PYTHON = re.compile(
    r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```$|^<!-- python\n(.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def name_of(page):
    return str(page.relative_to(ROOT))


def python_of(page):
    """Returns the Python of a page, each line where it is on the page."""
    text = page.read_text()
    code = "\n" * text.count("\n")
    for found in _PYTHON.finditer(text):
        before = text[: found.start(found.lastindex)].count("\n")
        # The options of a notebook's cell are no Python.
        block = re.sub(r"^:[\w-]+:.*$", "", found[found.lastindex], flags=re.MULTILINE)
        lines = code.split("\n")
        lines[before : before + block.count("\n")] = block.split("\n")[:-1]
        code = "\n".join(lines)
    return code if code.strip() else None


def run_python_of(page):
    """Runs the Python of a page, and returns what it has defined."""
    defined = {"__name__": "__main__"}
    exec(compile(python_of(page), page, "exec"), defined)
    return defined
