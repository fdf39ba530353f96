"""Every block of Python on the pages of the documentation runs as it stands there."""

import pytest
from pages import PAGES, name_of, python_of, run_python_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.mark.parametrize("page", filter(python_of, PAGES), ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python_of(page)
