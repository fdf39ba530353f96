"""Times in a report: measured in turn, kept with their record, shown again."""

import dataclasses
import json

import pytest
from report_page import Page, save_networks

from train.__main__ import main
from train.report import speed
from train.report.subjects import read_subjects
from train.verbs import report as verb

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    found = save_networks(tmp_path_factory.mktemp("speed"))
    return [str(found[name]) for name in ("dense", "small")]


@pytest.fixture(scope="module")
def subjects(paths):
    return read_subjects(paths)


def test_each_network_is_timed_with_one_image_and_with_many(subjects):
    latency = speed.measure_latency(subjects)
    assert set(latency["networks"]) == {s.sha256 for s in subjects}
    for times in latency["networks"].values():
        assert set(times) == {"1", "64"}
        for spread in times.values():
            assert 0 < spread["min_ms"] <= spread["median_ms"] <= spread["max_ms"]
    # What JSON has kept is found again, and only for what it is of.
    record = json.loads(json.dumps({"latency": latency}))
    assert speed.kept_latency(record, subjects) == latency
    (alone,) = speed.kept_latency(record, subjects[:1])["networks"]
    assert alone == subjects[0].sha256


def test_times_of_another_machine_or_network_are_not_kept(subjects):
    networks = {s.sha256: {"1": {"median_ms": 1.0}} for s in subjects}
    latency = {"machine": speed._this_machine(), "networks": networks}
    assert speed.kept_latency({"latency": latency}, subjects) == latency
    elsewhere = {**latency, "machine": {**latency["machine"], "num_cpus": 0}}
    other = dataclasses.replace(subjects[0], sha256="another")
    for record, of in (
        ({"latency": elsewhere}, subjects),
        ({"latency": latency}, [*subjects, other]),
        ({"latency": None}, subjects),
        ([], subjects),
        (None, subjects),
    ):
        assert speed.kept_latency(record, of) is None


@pytest.mark.slow
def test_a_report_measures_once_and_shows_what_it_measured(
    paths, subjects, tmp_path, monkeypatch
):
    calls = []

    def measure(subjects):
        calls.append(len(subjects))
        times = {"1": {"median_ms": 0.123}, "64": {"median_ms": 4.56}}
        networks = {s.sha256: times for s in subjects}
        return {"machine": speed._this_machine(), "networks": networks}

    monkeypatch.setattr(verb, "measure_latency", measure)
    out = tmp_path / "page"
    for more in (["--latency"], ["--latency"], []):
        arguments = ["report", *paths, "--out", str(out), "--images", "0", *more]
        assert main(arguments) == 0
        text = out.with_suffix(".html").read_text()
        assert {"0.123", "4.56"} <= {*next(r for r in Page(text).rows if "small" in r)}
        assert 'id="figure-tradeoff-latency-64-0"' in text
    assert calls == [2]


def test_cycles_are_those_of_the_compiler(subjects, no_shape_checks):
    pytest.importorskip("libtpu", reason="needs libtpu: the extra `tpu`")
    cycles = [speed.estimate_cycles(s.network, "v5e", batch_size=2) for s in subjects]
    assert all(isinstance(c, int) and c > 0 for c in cycles)
