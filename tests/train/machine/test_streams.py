"""Standard streams that go away end no program and prevent no start."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from helpers import FIT_ONE, HEARING, save_bright_digits

from train.run.checkpoints import latest_steps

# A program: prints much, as a training does.
PRINTING = """
import os, sys
from train.machine.streams import is_output_lost, keep_streams
keep_streams()
for number in range(1000):
    print("line", number, "x" * 99, flush=number % 2 == 0)
    print("warning", number, file=sys.stderr)
sys.stdout.flush()
sys.stdout.buffer.write(b"bytes"); sys.stdout.flush()
os.system("true")
with open(sys.argv[1], "w") as file:
    print(is_output_lost(), file.fileno(), file=file)
"""


def run_shell(command, env, **options):
    """Runs a command of bash."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**env, "PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


@pytest.mark.parametrize("flags", ["", "-u"])
@pytest.mark.parametrize(
    ("redirection", "is_lost", "is_said"),
    [
        ("| head -1", False, False),
        ("> /dev/full", True, True),
        ("2> /dev/full", False, False),
        ("> /dev/full 2>&1", True, False),
        (">&-", False, False),
        ("2>&-", False, False),
        ("<&- >&- 2>&-", False, False),
        ("2>&1 | head -1", False, False),
        ("> /dev/null", False, False),
    ],
)
def test_a_program_goes_on(
    redirection, is_lost, is_said, flags, subprocess_env, tmp_path
):
    program = tmp_path / "program.py"
    program.write_text(PRINTING)
    out = tmp_path / "out"
    env = {**subprocess_env, "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONUNBUFFERED", None)
    found = run_shell(f"$PYTHON {flags} {program} {out} {redirection}", env)
    assert found.returncode == 0, found.stderr
    lost, descriptor = out.read_text().split()
    assert lost == str(is_lost) and int(descriptor) > 2
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr
    said = "standard output cannot be written: No space left on device"
    assert found.stderr.count(said) == is_said


def test_a_slow_reader_of_a_pipe_that_never_blocks_gets_all(subprocess_env, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PRINTING)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    env = {**subprocess_env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, program, tmp_path / "out"]
    with subprocess.Popen(
        command, env=env, stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        time.sleep(1)  # the pipe, which holds 64 KiB, is full
        with os.fdopen(ours, "rb") as file:
            lines = file.read().splitlines()
    assert process.returncode == 0
    assert len(lines) == 1001


def test_what_is_printed_arrives(subprocess_env, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PRINTING)
    env = {**subprocess_env, "PYTHONPATH": str(ROOT)}
    found = run_shell(f"$PYTHON {program} {tmp_path / 'out'}", env)
    lines = found.stdout.splitlines()
    assert lines == [f"line {i} {'x' * 99}" for i in range(1000)] + ["bytes"]
    assert found.stderr.splitlines() == [f"warning {i}" for i in range(1000)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection",
    ["| head -1", "> /dev/full", "2> /dev/full", ">&-", "> /dev/full 2>&1"],
)
def test_a_training_goes_on(redirection, subprocess_env, tmp_path):
    data = save_bright_digits(tmp_path / "set.npz", 64, 16, 10)
    words = [*FIT_ONE, "--data.source", data, "--workdir", str(tmp_path / "run")]
    found = run_shell(
        f"$PYTHON -m train {' '.join(words)} {redirection}", subprocess_env
    )
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert latest_steps(tmp_path / "run" / "checkpoints") == [4]


@pytest.mark.slow
def test_a_result_that_is_lost_is_no_success(subprocess_env):
    found = run_shell("$PYTHON -m train evaluate --help > /dev/full", subprocess_env)
    assert "No space left on device" in found.stderr
    assert found.returncode == 1, found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0, 3.0, 4.0])
def test_ctrl_c_in_the_first_seconds_is_one_line(seconds, subprocess_env, tmp_path):
    data = save_bright_digits(tmp_path / "set.npz", 64, 16, 10)
    words = [*FIT_ONE, "--data.source", data, "--workdir", str(tmp_path / "run")]
    words += ["--epochs", "999", "--no-huge-pages"]
    # Counting lines would begin first, and take the signal.
    subprocess_env.pop("COVERAGE_PROCESS_CONFIG", None)
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING, "-m", "train", *words],
        env=subprocess_env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "interrupted" in output or "stopped by SIGINT and saved" in output
