"""Every block of Python on the pages of the documentation runs as it stands there."""

import pytest
from pages import PAGES, name_of, python_of, run_python_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


# Pages that need more than the extra `train`.
NEEDS = {"docs/deployment.md": "qwix"}


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    if (package := NEEDS.get(name_of(page))) is not None:
        pytest.importorskip(package, reason="needs the extra `int8`")
    monkeypatch.chdir(tmp_path)
    run_python_of(page)
