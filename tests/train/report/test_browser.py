"""The page of a report in headless Chromium: figures, tables, maps, and no error."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import pytest
from report_page import report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# What a reader does with the page, and what is then to be seen. The answer is left in
# the document, which Chromium prints.
PROBE = pathlib.Path(__file__).with_name("probe.js").read_text()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory, browser):
    folder = tmp_path_factory.mktemp("browser")
    _, text, _, record = report(folder, "--images", "2")
    file = folder / "probed.html"
    assert text.count("</body>") == 1
    file.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    return file, record


def visit(browser, page, folder, *options):
    """Returns what the probe has found, and what the console said."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={folder}", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=20000", *options, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert found, (console, done.stderr[-2000:])
    return json.loads(html.unescape(found[1])), console


@pytest.mark.parametrize(
    ("options", "ground"),
    [
        (["--window-size=1280,900"], "rgb(252, 252, 251)"),
        (["--window-size=500,900", "--force-dark-mode"], "rgb(20, 23, 27)"),
    ],
    ids=["wide and light", "narrow and dark"],
)
def test_a_reader_sees_every_figure_and_moves_what_moves(
    options, ground, browser, page, tmp_path
):
    file, record = page
    found, console = visit(browser, file, tmp_path, *options)
    assert console == []
    figures = re.findall(r'<svg [^>]*id="([^"]+)"', file.read_text())
    assert found["figures"] == figures and len(figures) == 13
    assert found["blocks"] == 1
    subjects = sorted(record["subjects"], key=lambda s: s["cost"]["params"])
    names = [subject["name"] for subject in subjects]
    assert found["ascending"] == names
    assert found["descending"] == names[::-1]
    (first, is_same), (last, is_unmoved) = found["moved"]
    assert "below all friction, 100.0% of the gates open" in first and is_same
    assert ", 0.0% of the gates open" in last and not is_unmoved
    (own, place) = found["own"]
    assert own.startswith("conv1: threshold 0.2, ") and place > 0
    assert found["back"] == own
    assert found["second"].startswith("conv2: threshold 0.3, ")
    assert found["hidden"] == ["1"]
    wide, window = found["widths"]
    assert wide <= window
    assert found["ground"] == ground


def test_the_console_would_tell_of_an_error(browser, page, tmp_path):
    file, _ = page
    broken = file.with_name("broken.html")
    text = file.read_text()
    picture = '<img src="https://example.invalid/x.png">'
    broken.write_text(text.replace("</h1>", f"</h1>{picture}", 1))
    _, console = visit(browser, broken, tmp_path)
    assert "Content Security Policy" in " ".join(console)
