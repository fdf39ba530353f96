"""Every block of Python on the pages of the documentation runs as it stands there."""

import pytest
from pages import PAGES, name_of, python_of, run_python_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


# Pages that need more than the extra `train`.
NEEDS = {
    "docs/deployment.md": {"qwix": "int8", "onnxruntime": "onnx", "onnxscript": "onnx"}
}


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    for package, extra in NEEDS.get(name_of(page), {}).items():
        pytest.importorskip(package, reason=f"needs the extra `{extra}`")
    monkeypatch.chdir(tmp_path)
    run_python_of(page)
