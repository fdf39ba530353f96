"""The pages of the documentation: each is listed, and all Python on them runs."""

import re

import pytest
from conftest import ROOT
from pages import PAGES, name_of, python_of, run_python_of


def test_every_page_is_in_a_list_of_the_site():
    docs = ROOT / "docs"
    listed = {docs / "index.md", ROOT / "README.md"}
    for page in PAGES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            names = [x for x in block.split() if re.fullmatch(r"[\w/]+", x)]
            listed |= {page.parent / f"{name}.md" for name in names}
    assert not set(PAGES) - listed


# Pages that need more than the extra `train`.
NEEDS = {
    "docs/deployment.md": {"qwix": "int8", "onnxruntime": "onnx", "onnxscript": "onnx"}
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    for package, extra in NEEDS.get(name_of(page), {}).items():
        pytest.importorskip(package, reason=f"needs the extra `{extra}`")
    monkeypatch.chdir(tmp_path)
    run_python_of(page)
