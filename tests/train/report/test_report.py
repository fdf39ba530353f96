"""The report as a whole: its page, its Markdown and its record, and bad input."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from report_page import (
    EPOCHS,
    Page,
    json_of,
    lenet,
    predictions,
    report,
)

import inertia_jax as ij
from inertia_jax.metadata import load_metadata
from train.__main__ import main

pytestmark = pytest.mark.usefixtures("one_device")

FIGURES = {
    *("curves-accuracy", "curves-loss", "tradeoff-macs-0", "tradeoff-params-0"),
    *("energy-0", "ranks-0", "gates-0", "gates-mean", "gates-course-2"),
    *("classes-0", "confusion-0", "confusion-1", "confusion-2"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return report(tmp_path_factory.mktemp("report"), "--images", "2")


@pytest.mark.slow
def test_the_page_has_every_figure_and_asks_for_nothing(files):
    _, text, _, _ = files
    page = Page(text)
    figures = {i.removeprefix("figure-") for i in page.ids("figure")}
    assert figures == FIGURES == set(page.ids("svg"))
    ids = page.ids()
    assert len({*ids}) == len(ids)
    # What a style or an element refers to is in the page.
    referred = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert {one or other for one, other in referred} <= {*ids}
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    policy = next(a for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none';")
    # No colour is left that stands for one of the page.
    assert not re.findall(r"#010[12][0-9a-f]{2}", text)
    assert "A <CPU> & more" in "".join(page.words)


def test_tables_and_markdown_say_what_the_record_says(files):
    _, text, markdown, record = files
    page = Page(text)
    for place, subject in enumerate(record["subjects"], start=1):
        (row,) = (r for r in page.rows if r[:2] == [str(place), subject["name"]])
        expected = f"{subject['top1']:.2%}"
        assert row[2] == expected
        assert f"{subject['cost']['params']:,}" in row
        assert f"| {place} | {subject['name']} | {expected} |" in markdown
        for layer in subject["layers"]:
            (found, *_) = (r for r in page.rows if r[1] == layer["path"])
            assert found
            assert f"| {layer['path']} | {layer['kind']} |" in markdown
    for made in (
        "python -m train fit --seed 7",
        "--ranks ratio:0.5 --no-weigh --seed 3",
    ):
        assert made in markdown and made in "".join(page.words)


def test_the_confusion_matrix_is_that_of_the_answers(files):
    paths, _, _, record = files
    answers, labels = predictions(lenet(), paths["dense"].with_name("digits.npz"))
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels, answers), 1)
    evaluation = record["subjects"][0]["evaluation"]
    np.testing.assert_array_equal(evaluation["confusion"], expected)
    assert record["subjects"][0]["top1"] == np.trace(expected) / 30


def test_the_kept_energy_is_that_of_the_kernels(files):
    paths, _, _, record = files
    _, dense = ij.load_checkpoint(paths["dense"])
    _, small = ij.load_checkpoint(paths["small"])
    rows = {row["path"]: row for row in record["subjects"][1]["layers"]}
    kernel = np.asarray(dense["params"]["conv2"]["kernel"], np.float64)
    parts = {n: np.asarray(p["kernel"]) for n, p in small["params"]["conv2"].items()}
    u_in, u_out = parts["u_in"][0, 0], parts["u_out"][0, 0]
    product = np.einsum("ir,hwrs,so->hwio", u_in, parts["core"], u_out)
    missed = ((kernel - product) ** 2).sum() / (kernel**2).sum()
    # The kernels are in float32.
    np.testing.assert_allclose(rows["conv2"]["energy"], 1 - missed, rtol=1e-6)
    assert 0.1 < rows["conv2"]["energy"] < 0.99
    assert rows["fc1"]["energy"] is None
    assert rows["conv2"]["ranks"] == [u_in.shape[1], u_out.shape[0]]


def test_the_course_of_gates_is_that_of_the_metrics(files):
    _, text, _, record = files
    curve = record["subjects"][2]["training"]["curve"]
    assert len(curve) == EPOCHS
    assert curve[1]["test_gate_rates"] == {"conv1": 0.5, "conv2": 0.5}
    assert curve[1]["train_gate_rate"] == 0.5
    assert "here 25% to 75%, on the test images" in text


def test_the_script_has_maps_that_open_as_the_network_does(files):
    _, text, _, _ = files
    (maps,) = json_of(text, "map-data")
    assert maps["subject"] == 2 and len(maps["pictures"]) == 2
    assert [layer["path"] for layer in maps["layers"]] == ["conv1", "conv2"]
    assert [layer["thresholds"] for layer in maps["layers"]] == [1, 32 // 2]


def test_one_run_has_its_curve_and_the_record_of_before(files, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(files[0]["run"], run, ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["report", str(run), "--seconds-to", "0.15"]) == 0
    # A name of one of the files is that of all.
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    written = sorted(file.name for file in tmp_path.glob("page*"))
    assert written == ["page.html", "page.json", "page.md", "page.png"]
    capsys.readouterr()
    assert main(["report", str(run), "--seconds-to", "0.15"]) == 0
    record = json.loads((run / "report.json").read_text())
    assert record["config"]["name"] == "gated run"
    assert record["curve"] == record["subjects"][0]["training"]["curve"]
    assert record["seconds_to"]["0.15"]["epoch"] == 2
    assert "best: epoch 3, test top-1 30.00%" in capsys.readouterr().out
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "seconds to 15.00%: after epoch 2" in (run / "report.md").read_text()


def test_what_cannot_be_found_out_is_left_out_and_said(files, tmp_path, capsys):
    small, run = tmp_path / "small", tmp_path / "run"
    shutil.copytree(files[0]["run"], run, ignore=shutil.ignore_patterns("checkpoints"))
    # The data, and the network before, are no longer there.
    network, metadata = ij.load_checkpoint(files[0]["small"]), moved_metadata(files)
    ij.save_checkpoint(small, *network, metadata=metadata)
    assert main(["report", str(small), str(run), "--out", str(tmp_path / "page")]) == 0
    assert "small is not evaluated" in capsys.readouterr().err
    words = " ".join(Page((tmp_path / "page.html").read_text()).words)
    assert "small: without measured accuracy, classes and maps: " in words
    assert "small: without kept energy: the network before cannot be compared" in words
    assert (
        "gated run: without accuracy, costs and layers: the run has saved no" in words
    )
    (small, run) = json.loads((tmp_path / "page.json").read_text())["subjects"]
    assert small["evaluation"] is None and small["cost"]["params"] > 0
    assert run["cost"] is None and run["training"]["curve"]


def moved_metadata(files):
    """Returns the metadata of the factorised network, of which all else has gone."""
    metadata = load_metadata(files[0]["small"])
    gone = {"compressed": {"checkpoint": "gone", "ranks": "ratio:0.5"}}
    gone["config"] = {"data": {"source": "npz:gone.npz"}}
    return dataclasses.replace(metadata, info=gone)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere"], "there is no run at nowhere"),
        (["{dense}", "{dense}"], "must be named once"),
        (["{dense}", "--images", "-1"], "`images` (=-1) must be >= 0"),
        (["{dense}", "--data", "npz:none.npz"], "none.npz"),
        (["{dense}", "--device", "v9"], "must be one of v4"),
        (["{dense}", "--seconds-to", "2"], "does nothing"),
    ],
)
def test_bad_input_is_one_error(words, error, files, tmp_path, capsys):
    words = [word.format(**files[0]) for word in words]
    assert main(["report", *words, "--out", str(tmp_path / "page")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and error in told
    assert not list(tmp_path.glob("page*"))
