"""Ctrl-C ends the program, whatever it comes upon."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from train.machine.interrupt import interrupt

# A program: imports a module that catches everything, or has a callback of importlib's
# locks of modules interrupted, whose errors Python prints and drops.
PROGRAM = """
import signal, sys
from train.machine.interrupt import interrupt
signal.signal(signal.SIGINT, interrupt)
sys.path.insert(0, sys.argv[1])
print("begun")
import swallowing
print("went on")
"""
CAUGHT = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
"""
IN_A_CALLBACK = """
import signal, sys
def interrupt_callbacks(frame, event, argument):
    if frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)
sys.setprofile(interrupt_callbacks)
import colorsys
"""


@pytest.mark.parametrize("code", [CAUGHT, IN_A_CALLBACK])
def test_no_import_swallows_it(code, tmp_path):
    (tmp_path / "swallowing.py").write_text(code)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 130, found.stderr
    assert found.stdout == "begun\n"
    assert found.stderr == "interrupted before the end.\n"


def test_elsewhere_it_is_an_error_as_usual():
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
