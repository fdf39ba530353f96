"""Figures and tables of a report, against values that are worked out by hand."""

import dataclasses
import pathlib
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from inertia_jax.cost.table import CostTable, LayerCost
from train.evaluate.evaluation import Evaluation
from train.report.class_figures import draw_confusion, worst_pairs
from train.report.findings import Findings
from train.report.overview import draw_curves, draw_tradeoffs, pareto_front
from train.report.record import make_report_record
from train.report.subjects import Subject, compress_command, parent_of
from train.report.tables import Column, layer_table, make_table, network_table

# Rows are classes, columns answers: of four cats, two are taken for dogs.
CONFUSION = np.array([[2, 2, 0], [0, 3, 1], [0, 0, 5]])
EVALUATION = Evaluation(
    num_examples=13,
    loss=0.5,
    top1=10 / 13,
    top5=1.0,
    confusion=CONFUSION,
    class_names=("cat", "dog", "<ox>"),
    gate_rates={},
    right=np.ones(13, bool),
    predictions=np.repeat([0, 1, 2], [2, 5, 6]),
)


def found(place, *, macs, top1, epochs=0):
    """Returns what would be known of a network of one layer."""
    layer = LayerCost("conv", "conv", (2, 2, 1), params=9, macs=macs)
    row = {"train_loss": 1.0, "test_loss": 2.0, "train_accuracy": 0.5}
    curve = [{"epoch": e + 1, "test_top1": top1, **row} for e in range(epochs)]
    record = {"config": {"name": "x"}, "starts": [], "curve": curve} if epochs else None
    evaluation = Evaluation(**{**vars(EVALUATION), "top1": top1})
    subject = Subject(f"n{place}", pathlib.Path("n"), record, None, "", ())
    return Findings(subject, "npz:x", evaluation, CostTable((layer,)))


def parts(figure):
    """Returns the subject of each part that is one's, and the markers in it."""
    root = ElementTree.fromstring(f'<p xmlns:xlink="x">{figure.svg}</p>')
    groups = [g for g in root.iter("g") if g.get("class") == "of-subject"]
    return [(g.get("data-subject"), [*g.iter("use")]) for g in groups]


def test_the_pareto_front_is_that_of_the_points():
    #        0    1    2    3    4    5
    costs = (5.0, 1.0, 3.0, 3.0, 4.0, 1.0)
    marks = (0.9, 0.5, 0.7, 0.8, 0.8, 0.5)
    # 2 is worse than 3 at the same cost, 4 is as good as 3 and costs more; 1 and 5 are
    # equal, so that neither is better.
    assert pareto_front(costs, marks) == [1, 5, 3, 0]
    assert pareto_front([2.0], [0.1]) == [0]


def test_the_front_is_marked_in_the_figure():
    marks = ((100, 0.5), (200, 0.4), (300, 0.9))
    subjects = [found(i, macs=m, top1=s) for i, (m, s) in enumerate(marks)]
    figure, _ = draw_tradeoffs(subjects, device=None)
    # A ring is a marker that is not filled.
    drawn = [(subject, use[0].get("style")) for subject, use in parts(figure) if use]
    assert [subject for subject, style in drawn if "fill-opacity: 0" in style] == [
        "0",
        "2",
    ]
    assert [s for s, style in drawn if "fill-opacity: 0" not in style] == [
        "0",
        "1",
        "2",
    ]
    # Each has a number, too.
    assert sum(not use for _, use in parts(figure)) == 3
    assert "npz:x" in figure.caption


def test_a_run_of_one_epoch_is_a_point():
    for epochs in (1, 2):
        figure, _ = draw_curves([found(0, macs=1, top1=0.5, epochs=epochs)])
        assert [len(use) for _, use in parts(figure)] == [epochs == 1] * 2


def test_validation_images_have_a_curve_where_they_choose():
    runs = [found(i, macs=1, top1=0.5, epochs=2) for i in range(2)]
    for row in runs[1].subject.record["curve"]:
        row |= {"validation_top1": 0.4, "validation_loss": 3.0}
    plain, _ = draw_curves(runs[:1])
    figure, _ = draw_curves(runs)
    assert [subject for subject, _ in parts(figure)] == [*"00", *"111"]
    assert "Dotted: validation" in figure.caption
    assert "validation" not in plain.caption


def test_the_confusion_matrix_has_its_numbers_and_mistakes():
    figure = draw_confusion(EVALUATION, 4)
    assert figure.name == "confusion-4" and figure.subject == 4
    told = re.findall(r"<text [^>]*>(\d)</text>", figure.svg)
    assert told == ["2", "2", "3", "1", "5"]
    assert "&lt;ox&gt;" in figure.svg and "<ox>" not in figure.svg
    assert worst_pairs(EVALUATION) == [("cat", "dog", 2), ("dog", "<ox>", 1)]


def test_tables_leave_out_what_nothing_has():
    columns = [
        Column("name", lambda row: row["a"]),
        Column("number", lambda row: row["b"], "{:.1f}"),
        Column("nothing", lambda row: None),
    ]
    table = make_table(columns, [{"a": "x", "b": 0}, {"a": None, "b": None}])
    assert [head["words"] for head in table["heads"]] == ["name", "number"]
    assert [[cell["text"] for cell in row] for row in table["rows"]] == [
        ["x", "0.0"],
        ["-", "-"],
    ]
    assert [cell["value"] for cell in table["rows"][0]] == ["x", 0]


def test_networks_are_compared_with_the_first_on_the_same_images():
    first = found(0, macs=1, top1=1.0)
    right = np.arange(13) < 9  # four of 13 are lost
    evaluation = Evaluation(**{**vars(EVALUATION), "right": right})
    second = dataclasses.replace(first, evaluation=evaluation)
    elsewhere = dataclasses.replace(second, source="npz:y")
    plain = dataclasses.replace(first, evaluation=None, source=None)
    every = [first, second, elsewhere, plain]
    record = make_report_record(every, latency=None, device=None, cycles_batch=64)
    margin = 1.96 * (4 * 9 / 13**2 / 13) ** 0.5
    assert [s["difference"] for s in record["subjects"]] == [
        *(0, pytest.approx(-4 / 13), None, None)
    ]
    assert record["subjects"][1]["margin_95"] == pytest.approx(margin)
    rows = [
        {**row, "index": i, "gate_rate": None, "epochs": None, "seconds": None}
        for i, row in enumerate(record["subjects"])
    ]
    table = network_table(rows, None)
    place = [head["words"] for head in table["heads"]].index("points to #1")
    cells = [row[place]["text"] for row in table["rows"]]
    assert cells == ["-", f"-30.77 +-{100 * margin:.2f}", "-", "-"]


def test_layers_without_operations_are_counted_in_one_row():
    rows = [
        LayerCost("conv", "tucker2", (4, 3, 8), 100, 1200, 2400, ranks=(2, 3)),
        LayerCost("bn", "other", (), 16, 0),
    ]
    table = layer_table([{**vars(row), "energy": 0.5} for row in rows])
    (row,) = table["rows"]
    assert [c["text"] for c in row][3:6] == ["4 x 3 x 8", "2, 3", "0.500"]
    assert [c["value"] for c in row][3:5] == [96, 6]
    assert table["totals"] == [
        "1 other layers: 16 parameters, 0 MACs",
        "total: 116 parameters, 1,200 MACs",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"macs": 0.5}, "--macs 0.5"),
        ({"ranks": "ratio:0.5", "keep_stem": True}, "--ranks ratio:0.5 --keep-stem"),
        (
            {"weigh": False, "also_test": ["npz:a b"]},
            "--no-weigh --also-test 'npz:a b'",
        ),
        ({"also_test": [], "factory": "m:f"}, "--model.factory m:f"),
    ],
)
def test_a_compression_is_told_by_its_options(options, words):
    told = compress_command({"checkpoint": "runs/x", "out": "small", **options})
    assert told == f"python -m train compress runs/x --out small {words}"


def test_a_checkpoint_comes_from_what_it_was_compressed_or_trained_from():
    trained = {"config": {"init": "/before"}}
    assert parent_of(trained) == "/before"
    assert parent_of({**trained, "compressed": {"checkpoint": "run"}}) == "run"
    assert parent_of({"config": {"init": None}}) is parent_of({}) is None
