"""Each file of examples/ runs as it says, and its last lines show what it promises."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

# A line of each, with a number in it, and the least that the number may be. Networks
# that guess have 10% of the digits.
PROMISED = {
    "compress_linen": (r"tuned .* (\S+)% of 297 digits", 85),
    "compress_nnx": (r"tuned .* (\S+)% of 297 digits", 85),
    "inertial_layers": (r"12: loss .*, (\S+)%, open gates 0\.[34]", 70),
    "torch_to_file": (r"differ from the network's by \d+e-(\d+)", 5),
    "int8": (r"int8, trained so: (\S+)% of 297", 85),
}


def test_every_example_is_tested_and_fits_a_page():
    files = {file.stem: file for file in (ROOT / "examples").glob("*.py")}
    assert files.keys() == PROMISED.keys()
    assert all(len(file.read_text().splitlines()) <= 80 for file in files.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISED)
def test_an_example_does_what_it_says(name, subprocess_env, tmp_path):
    if name == "int8":
        pytest.importorskip("qwix", reason="needs the extra `int8`")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        env={**subprocess_env, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line, least = PROMISED[name]
    found = re.search(line, done.stdout)
    assert found, done.stdout
    assert float(found[1]) >= least
