"""Whatever is read is taken, or refused as its documentation says, within bounds."""

import fuzzing
import numpy as np
import pytest
from hypothesis import strategies as st
from targets import MB, TARGETS, Target

pytestmark = pytest.mark.usefixtures("no_shape_checks")

# The command line takes a tenth of a second for each input.
SLOW = {"options"}


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in SLOW])
def test_a_few_inputs_are_taken_or_refused(name, tmp_path):
    taken, refused = fuzzing.fuzz(TARGETS[name], 25, tmp_path)
    assert taken + refused >= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_taken_or_refused(name, tmp_path):
    count = 40 if name in SLOW else 800
    taken, refused = fuzzing.fuzz(TARGETS[name], count, tmp_path, seed=1)
    # Inputs that all are refused at once would show nothing.
    assert taken and (refused or name in ("runs",))


def grow(_, folder):
    return np.ones(100 * MB, np.uint8)


def hide(given, folder):
    try:
        grow(given, folder)
    except MemoryError as error:
        raise ValueError("it is damaged") from error


def hang(_, folder):
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


def fail(_, folder):
    raise KeyError("x")


def talk(_, folder):
    raise ValueError("x" * 10_000)


@pytest.mark.parametrize("read", [grow, hide, hang, fail, talk])
def test_what_breaks_a_bound_is_found(read, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "MOST_SECONDS", 0.2)
    target = Target(st.just(0), read)
    with pytest.raises((MemoryError, AssertionError, KeyError)):
        fuzzing.attempt(target, 0, tmp_path)
    # And bounds end with the input.
    assert fuzzing.attempt(Target(st.just(0), lambda *_: None), 0, tmp_path)
    assert np.ones(100 * MB, np.uint8).all()
