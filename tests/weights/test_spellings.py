"""Other names of the same layers, and new names of parts of keys."""

import pytest

from inertia_jax.weights.spellings import known_spellings, renamed


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("fc.weight", "fc", "linear", "linear.weight"),
        ("a.fc2.weight", "fc", "linear", "a.fc2.weight"),
        ("a.b.c.b.c", "b.c", "d", "a.d.d"),
        ("student.fc.bias", "student", "", "fc.bias"),
        ("a.student.model.fc.bias", "student.model", "", "a.fc.bias"),
        ("conv3_x.0.weight", "conv*_x", "layer*", "layer3.0.weight"),
        ("conv3_x.0.weight", "conv*_x.*", "layer*.block*", "layer3.block0.weight"),
        ("conv3_x.0.weight", "*", "x", "x.x.x"),
        ("conv3.x.weight", "conv*_x", "layer*", "conv3.x.weight"),
        ("a+b.weight", "a+b", r"\1", r"\1.weight"),
    ],
)
def test_parts_of_keys_are_renamed(name, old, new, expected):
    assert renamed(name, old, new) == expected


def test_spellings_are_known_both_ways_and_never_guessed():
    ours = ["layer2.0.shortcut.0.weight", "linear.bias"]
    theirs = ["layer2.0.downsample.0.weight", "classifier.bias"]
    assert known_spellings(theirs, ours) == dict(zip(theirs, ours, strict=True))
    assert known_spellings(ours, theirs) == dict(zip(ours, theirs, strict=True))
    assert known_spellings([*theirs, "fc.bias"], ours) == {theirs[0]: ours[0]}
    assert known_spellings(theirs, [*ours, "head.bias"]) == {theirs[0]: ours[0]}
    assert known_spellings(["layer1.downsample.0.weight", "head.weight"], ours) == {}
