"""What befalls the program is survived, or refused in one message."""

import subprocess
import sys

import pytest
from conftest import ROOT
from session import Case, Failure, differences, judge

import inertia_jax as ij

ERROR = "error: run/config.json is no JSON.\n"


@pytest.mark.slow
def test_a_few_faults_of_each_kind_are_survived(subprocess_env):
    command = [sys.executable, "tests/faults/faulting.py", "--faults", "16"]
    found = subprocess.run(
        [*command, "--verbs", "fit", "import"],
        cwd=ROOT,
        env=subprocess_env,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    (row,) = (x for x in found.stdout.splitlines() if x.startswith("all "))
    cases, caused, same, refused, failed, skipped, left_out = map(int, row.split()[1:8])
    assert cases == same + refused + skipped >= 16 and caused >= 12
    assert failed == left_out == 0


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (None, ""),
        (0, "Traceback (most recent call last):"),
        (2, f"{ERROR}Exception ignored in: <function>"),
        (1, ERROR),
        (-11, ""),
        (0, ERROR),
        (2, "warning: run/config.json is no JSON."),
        (2, ERROR + ERROR),
        (2, "error: run/run.jsonl is no JSON.\n"),
    ],
)
def test_what_is_neither_done_nor_refused_fails(code, output):
    with pytest.raises(Failure):
        judge(code, output, names=("config.json",))


def test_an_end_is_done_or_refused():
    assert judge(0, "warning: x\n") == "done"
    assert judge(2, f"reading\n{ERROR}", names=("config.json",)) == "refused"


def test_what_differs_is_named():
    expected = {"run": [1, "a"], "net.ijx": "b"}
    assert differences(expected, {**expected}) == []
    found = differences(expected, {"run": [1, "c"]})
    assert found == ["net.ijx: 'b', None", "run 1: 'a', 'c'"]


@pytest.fixture
def case(tmp_path):
    """A folder with a checkpoint of a run, and one beside it."""
    model = ij.create_model("lenet", width=0.1)
    for name in ("run/checkpoints/step_00000001", "small"):
        ij.save_checkpoint(tmp_path / name, model, {"params": {}})
    return Case(None, "fit", None, tmp_path)


def test_a_lost_or_harmed_checkpoint_is_found(case):
    kept = case.check_kept(set())
    assert kept == {"run/checkpoints/step_00000001", "small"}
    for name in kept:
        away = case.folder / name
        aside = away.rename(case.folder / ".aside")
        with pytest.raises(Failure, match=f"{name} was lost"):
            case.check_kept(kept)
        aside.rename(away)
    manifest = case.folder / "small" / "metadata.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(Failure, match="was harmed"):
        case.check_kept(kept)
