"""The pages of the documentation: each is listed, and all Python on them runs."""

import re
import sys

import pytest
from conftest import ROOT
from pages import PAGES, has_python, name_of, run_python_of


def test_every_page_is_in_a_list_of_the_site():
    docs = ROOT / "docs"
    listed = {docs / "index.md", ROOT / "README.md"}
    for page in PAGES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            names = [x for x in block.split() if re.fullmatch(r"[\w/]+", x)]
            listed |= {page.parent / f"{name}.md" for name in names}
    assert not set(PAGES) - listed


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
# qwix uses names of Flax that are about to go.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*")
@pytest.mark.parametrize("page", [p for p in PAGES if has_python(p)], ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    _, missing = run_python_of(page)
    if missing:
        pytest.skip(f"ran, but for blocks that need {', '.join(sorted(missing))}")
