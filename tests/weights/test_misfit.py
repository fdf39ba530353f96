"""Keys that do not fit, and how they may be spelt otherwise."""

import pytest

from inertia_jax.weights.misfit import check_keys


def message(missing, surplus, problems=()):
    with pytest.raises(ValueError) as error:
        check_keys("Network", missing, surplus, problems)
    return str(error.value)


def test_what_fits_is_no_error():
    check_keys("Network", {}, {}, ())


def test_another_spelling_takes_a_line_and_not_one_a_key():
    missing, surplus = {}, {}
    for block in range(2, 5):
        for leaf, shape in (("0.weight", (8, 4, 1, 1)), ("1.weight", (8,))):
            missing[f"layer{block}.0.shortcut.{leaf}"] = shape
            surplus[f"layer{block}.0.downsample.{leaf}"] = shape
    missing |= {"linear.weight": (10, 8), "linear.bias": (10,), "bn1.weight": (8,)}
    surplus |= {"fc.weight": (10, 8), "fc.bias": (10,), "extra.weight": (3,)}
    lines = message(missing, surplus).split("\n  ")
    assert lines == [
        "the weights do not fit Network (18 keys):",
        "likely downsample=shortcut (`rename`), of 6 keys: "
        "layer2.0.downsample.0.weight is layer2.0.shortcut.0.weight",
        "likely fc=linear (`rename`), of 2 keys: fc.weight is linear.weight",
        "missing bn1.weight (8,)",
        "surplus extra.weight (3,)",
    ]


def test_other_depths_are_guessed_and_other_shapes_are_not():
    text = message({"linear.weight": (10, 8)}, {"classifier.6.weight": (10, 8)})
    assert "likely classifier.6=linear" in text
    text = message({"linear.weight": (10, 8)}, {"fc.weight": (100, 8)})
    assert "likely" not in text
    # A mean and a bias have one shape.
    text = message({"bn1.bias": (8,)}, {"bn1.running_mean": (8,)})
    assert "likely" not in text


def test_guesses_among_layers_of_one_shape_keep_their_numbers():
    missing, surplus = {}, {}
    for stage in (1, 2):
        for block in (0, 1):
            for layer in (1, 2):
                for leaf in ("weight", "bias"):
                    missing[f"layer{stage}.{block}.bn{layer}.{leaf}"] = (8,)
                    key = f"conv{stage}_x.{block}.residual.{layer}.1.{leaf}"
                    surplus = {key: (8,), **surplus}
    text = message(missing, surplus)
    assert "missing" not in text
    for line in text.split("\n  ")[1:]:
        theirs, ours = line.split()[1].split("=")
        stage, block, layer = (int(c) for c in ours if c.isdigit())
        assert theirs == f"conv{stage}_x.{block}.residual.{layer}.1"


def test_long_lists_are_cut():
    missing = {f"layer{i:03}.weight": (i + 1,) for i in range(200)}
    text = message(missing, {}, ["bn1.weight holds int64"])
    assert "(201 keys)" in text
    assert "bn1.weight holds int64" in text
    assert text.endswith("and 181 more like these")
    assert text.count("\n") == 21


def test_another_network_is_compared_in_a_moment():
    missing = {f"a{i}.b{i}.weight": (64, 64) for i in range(100)}
    surplus = {f"c{i}.d{i}.weight": (64, 64) for i in range(100)}
    assert message(missing, surplus).count("\n") <= 31
