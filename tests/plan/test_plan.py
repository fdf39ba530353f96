"""The plan: rules, JSON, and what it refuses."""

import json
import re
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij

PLAN = ij.Plan(
    (
        ("layer1_*/conv2", ij.Inertial(2, 4, reading="tiled", threshold=ij.Rate(0.25))),
        ("*/conv1", ij.Tucker2(12, 25, core=ij.Inertial(1, 3, gate_gradient="ste"))),
        ("*shortcut_0", ij.LowRank(8)),
        ("conv1", ij.Inertial(1, 3, threshold=ij.Learned(0.5, per_channel=True))),
        ("*", ij.Conv()),
    )
)


def test_the_first_rule_that_matches_wins():
    plan = ij.Plan((("layer1_0/*", ij.LowRank(1)), ("*/conv1", ij.LowRank(2))))
    assert plan.spec("layer1_0/conv1") == ij.LowRank(1)
    assert plan.spec("layer2_0/conv1") == ij.LowRank(2)
    assert plan.spec("conv1") == ij.Conv()


def test_globs_are_case_sensitive_and_cross_slashes():
    plan = ij.Plan((("layer4*conv1", ij.LowRank(1)), ("FC", ij.LowRank(2))))
    assert plan.spec("layer4/left/left/conv1") == ij.LowRank(1)
    assert plan.spec("fc") == ij.Conv()


def test_what_is_no_plan_is_answered_with_one():
    for text in ("inertial", "{}", '["*"]'):
        with pytest.raises(ValueError, match="e.g. ") as error:
            ij.Plan.from_json(text)
        example = str(error.value).split("e.g. ")[1].partition("]]")[0] + "]]"
        assert ij.Plan.from_json(example) == ij.Plan((("layer1_*", ij.Inertial(3, 5)),))


def test_json_there_and_back_is_the_same_plan():
    assert ij.Plan.from_json(PLAN.to_json()) == PLAN
    assert hash(ij.Plan.from_json(PLAN.to_json())) == hash(PLAN)
    assert ij.Plan.from_json("[]") == ij.Plan()


def test_a_plan_prints_its_rules():
    assert "Tucker2(rank_in=12, rank_out=25" in str(PLAN)
    assert str(ij.Plan()) == "Plan: every layer Conv()"


def test_lists_become_tuples():
    assert hash(ij.Plan([["*", ij.Conv()]])) == hash(ij.Plan((("*", ij.Conv()),)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ij.Inertial(3, 3), "`region_size` .*greater"),
        (lambda: ij.Inertial(0, 3), "`core_size`"),
        (lambda: ij.Inertial(1, 3, metric="l3"), "`metric`"),
        (lambda: ij.Inertial(1, 3, threshold=0.1), "`threshold`"),
        (lambda: ij.Inertial(1, 3, slope=0.0), "`slope`"),
        (lambda: ij.Inertial(1, 3, channel_stride=0), "`channel_stride`"),
        (lambda: ij.Tucker2(0, 3), "`rank_in`"),
        (lambda: ij.Tucker2(3, True), "`rank_out`"),
        (lambda: ij.Tucker2(3, 3, core=ij.LowRank(2)), "`core`"),
        (lambda: ij.LowRank(1.5), "`rank`"),
        (lambda: ij.Rate(1.5), "`target`"),
        (lambda: ij.Inertial(1, 3, relative="no"), "`relative`"),
        (lambda: ij.Learned(per_channel="no"), "`per_channel`"),
        (lambda: ij.Inertial(1, 3, capacities=1), "`capacities`"),
        (lambda: ij.Plan((("*", "conv"),)), "`rules`"),
        (lambda: ij.Plan(("*",)), "`rules`"),
        (lambda: ij.Plan.from_json("{"), "must be JSON"),
        (lambda: ij.Plan.from_json("{}"), "list of rules"),
        (lambda: ij.Plan.from_json('[["*"]]'), "pairs"),
        (lambda: ij.Plan.from_json('[["*", {"type": "Cnv"}]]'), "'Cnv'"),
        (
            lambda: ij.Plan.from_json('[["*", {"type": "LowRank", "rnk": 1}]]'),
            "unknown fields",
        ),
        (lambda: ij.Plan.from_json('[["*", {"type": "LowRank"}]]'), "incomplete"),
    ],
)
def test_bad_plans_are_refused(make, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        make()


def test_numpys_and_jaxs_numbers_are_numbers(no_shape_checks):
    for number in (np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        assert ij.Fixed(number) == ij.Fixed(0.5)
        assert ij.Rate(number) == ij.Rate(0.5)
        assert ij.Ratio(number) == ij.Ratio(0.5)
    capacities = jnp.array([0.5, 1], jnp.float32)
    spec = ij.Inertial(np.int64(1), 3, slope=np.float32(5), capacities=capacities)
    assert spec == ij.Inertial(1, 3, slope=5, capacities=(0.5, 1))
    plan = ij.Plan((("*", spec),))
    assert ij.Plan.from_json(plan.to_json()) == plan


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="'layer9\\*', which matches no convolution"):
        ij.create_model("resnet20", plan=ij.Plan((("layer9*", ij.Conv()),)))


def test_two_factors_of_a_filter_larger_than_one_pixel_are_refused():
    with pytest.raises(ValueError, match="LowRank.*'layer1_0/conv1'"):
        ij.create_model("resnet20", plan=ij.Plan((("*/conv1", ij.LowRank(2)),)))


TILED = ij.Inertial(3, 4, reading="tiled")
LARGE = ij.Inertial(5, 6)
STRIDED = "tiles need stride 1, it has 2"


def partly_dropped():
    factors = ij.Tucker2(2, 3, core=TILED)
    rules = (
        ("conv1", LARGE),
        ("layer2_0/conv1", factors),
        ("layer?_*", TILED),
        ("layer3_*", ij.LowRank(2)),
    )
    expected = (
        ("conv1", LARGE, "conv1", "core 5 exceeds kernel 3"),
        ("layer2_0/conv1", factors, "layer2_0/conv1", STRIDED),
        ("layer?_*", TILED, "layer3_0/conv1", STRIDED),
        ("layer3_*", ij.LowRank(2), "", "earlier rules win at all layers it matches"),
    )
    return ij.Plan(rules), tuple(ij.DroppedRule(*fields) for fields in expected)


@pytest.mark.slow
def test_rules_that_do_not_stand_are_told_with_layer_and_reason():
    plan, expected = partly_dropped()
    model = ij.create_model("resnet20", width=0.25, plan=plan)
    assert ij.dropped_rules(model, (32, 32, 3)) == expected
    assert str(expected[2]).startswith(
        "layer3_0/conv1 stays dense: tiles need stride 1, it has 2; the plan's rule "
        "'layer?_*' has Inertial(core_size=3, "
    )
    assert str(expected[3]) == (
        "the plan's rule 'layer3_*' is not used: earlier rules win at all layers it "
        "matches"
    )
    # The table of costs notes the same layers, and no others.
    rows = ij.count_cost(model, (32, 32, 3)).rows
    noted = {row.path: row.note for row in rows if row.note}
    assert noted == {rule.path: rule.reason for rule in expected[:3]}


def test_a_network_whose_rules_all_stand_has_dropped_none():
    model = ij.create_model("resnet20", plan=ij.Plan((("layer1_*", TILED),)))
    assert ij.dropped_rules(model, (32, 32, 3)) == ()
    assert ij.dropped_rules(ij.create_model("resnet20"), (32, 32, 3)) == ()
    assert ij.dropped_rules(nn.Dense(3), (8, 8, 1)) == ()


def test_a_strict_network_refuses_to_stay_dense_and_lists_where():
    plan, expected = partly_dropped()
    with pytest.raises(ValueError, match="`strict` .*=True") as caught:
        ij.create_model("resnet20", plan=plan, strict=True)
    # A rule that is never used leaves no layer otherwise than the plan has it.
    listed = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert listed == [str(rule) for rule in expected[:3]]
    ij.create_model("resnet20", plan=ij.Plan((("layer1_*", TILED),)), strict=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ij.Inertial(3, 10**6), "`region_size` (=1000000) must be an integer"),
        (lambda: ij.Inertial(3, 32), "<= 31"),
        (lambda: ij.Conv(1001), "`kernel_size` (=1001) must be an integer <= 31"),
        (lambda: ij.Tucker2(10**12, 1), "`rank_in` (=1000000000000) must be an"),
        (lambda: ij.Inertial(1, 3, slope="a"), "`slope` (='a') must be a number"),
        (lambda: ij.Fixed(10**400), "must be a number"),
        (
            lambda: ij.Inertial(1, 3, capacities=[i / 65 for i in range(1, 66)]),
            "must be at most 64",
        ),
        (lambda: ij.Inertial(1, 3, capacities=["a", 1]), "must be a sequence of num"),
        (lambda: ij.Plan.from_json("[" * 100_000), "nested too deep"),
        (lambda: ij.Plan.from_json('[["*", {"type": ["Conv"]}]]'), "holds type"),
        (lambda: ij.Plan.from_json(json.dumps([["*", {}]] * 10_001)), "at most 10,000"),
    ],
)
def test_what_a_stranger_plans_is_bounded_before_it_is_built(
    make, words, no_shape_checks
):
    with pytest.raises(ValueError, match=re.escape(words)) as found:
        make()
    assert len(str(found.value)) < 500


GLOBS = ("*", "net/*", "n*/b?/c*", "*conv1", "net/b1/conv1", "[mn]et/b[!2]/*", "*/b*1")


@pytest.mark.parametrize("glob", GLOBS)
def test_a_plan_is_cut_at_the_path_of_a_part(glob):
    plan = ij.Plan(((glob, ij.Tucker2(1, 1)),))
    for part in (("net",), ("net", "b1"), ("net/b1",), ("[x]",)):
        below = plan.below(part)
        above = below.above(part)
        for rest in ("conv1", "b1/conv1", "b2/conv1", "b1/c*", "b", "other"):
            path = "/".join((*part, rest))
            assert below.spec(rest) == above.spec(path) == plan.spec(path)
            assert above.spec(rest) == ij.Conv()


@pytest.mark.parametrize("glob", ["*" * 40, "*a" * 30, "*[ab]" * 30, "*?" * 9_000])
def test_a_glob_of_many_stars_is_cut_in_no_time(glob):
    plan = ij.Plan(((glob, ij.Tucker2(1, 1)),))
    start = time.process_time()
    below = plan.below(("a" * 40,))
    assert time.process_time() - start < 2.0  # before, longer than anyone waits
    for rest in ("conv1", "aaaa", "a" * 30):
        assert below.spec(rest) == plan.spec(f"{'a' * 40}/{rest}")
