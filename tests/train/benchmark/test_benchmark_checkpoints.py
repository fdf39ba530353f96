"""`benchmark CHECKPOINT`: what is timed is the network, and what is counted is its."""

import json

import jax
import numpy as np
import pytest

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.benchmark.checkpoints import Suite
from train.benchmark.runtimes import RUNTIMES
from train.evaluate.checkpoint import evaluate_network
from train.evaluate.settings import EvaluationSettings
from train.networks import read_network
from train.own_network import make_own_network

pytestmark = pytest.mark.usefixtures("one_device")

SHAPE = (6, 9, 1)
SEEN = Preprocessing(SHAPE, (0.5,), (0.25,))
GATES = ij.Inertial(3, 5, reading="tiled", threshold=ij.Fixed(0.2))
NETWORKS = {
    "dense": ("own_cnn:make", ()),
    "small": ("own_cnn:make", (("Conv_1", ij.Tucker2(3, 4)),)),
    "inertial": ("own_cnn:make", (("Conv_1", GATES),)),
    "sorted": ("own_cnn:make_sorted", ()),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    keys = iter(jax.random.split(jax.random.key(1), 99))

    def moved(leaf):
        return leaf + 0.2 * jax.random.uniform(next(keys), leaf.shape, leaf.dtype)

    for name, (factory, rules) in NETWORKS.items():
        model = make_own_network(factory, num_classes=7, plan=ij.Plan(rules))
        # A BatchNorm of ones and zeros would fold into anything.
        variables = jax.tree.map(
            moved, ij.init_variables(model, jax.random.key(0), SHAPE)
        )
        ij.save_checkpoint(
            folder / name, model, variables, metadata=Metadata(SEEN, tuple("abcdefg"))
        )
    rng = np.random.default_rng(0)
    images = rng.integers(120, 136, size=(5, *SHAPE)).astype(np.uint8)
    images[:2] += 60 * (np.arange(9) > 5).astype(np.uint8)[:, None]  # an edge
    labels = np.arange(5)
    np.savez(
        folder / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    return folder


def measured(capsys, *words):
    """Returns the rows that the program finds, and what people read."""
    assert main(["benchmark", *map(str, words), "--repeats", "1", "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out)["rows"], printed.err


def test_each_row_has_times_costs_and_the_gap_of_a_network(networks, capsys, tmp_path):
    out = tmp_path / "record.json"
    names = ("dense", "small")
    words = [*(networks / name for name in names), "--batch-sizes", "1", "3"]
    rows, _ = measured(capsys, *words, "--out", out)
    record = json.loads(out.read_text())
    assert record["rows"] == rows and record["machine"]["versions"]["jax"]
    found = [(row["checkpoint"], row["batch_size"]) for row in rows]
    assert found == [(str(networks / name), n) for n in (1, 3) for name in names]
    for row in rows:
        network = read_network(networks / row["checkpoint"])
        cost = ij.count_cost(network.model, SHAPE)
        assert (row["params"], row["macs"]) == (cost.params, cost.total_macs)
        assert row["image_shape"] == list(SHAPE)
        folded = ij.fold_batch_norm(
            network.model, network.variables, image_shape=SHAPE
        )[1]
        sizes = [leaf.size for leaf in jax.tree.leaves(folded)]
        assert row["num_bytes"] == 4 * sum(sizes) < 4 * cost.params + 200
        assert 0 < row["gap"] < 1e-5
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        rate = row["images_per_s"] * row["median_ms"] / 1e3
        assert rate == pytest.approx(row["batch_size"])
        first = next(r for r in rows if r["batch_size"] == row["batch_size"])
        assert row["speedup"] == pytest.approx(first["median_ms"] / row["median_ms"])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["torch", "onnx"])
@pytest.mark.filterwarnings("default")  # of those programs
def test_other_programs_have_the_same_logits_or_say_why_not(networks, capsys, program):
    for package in ({"onnx": "onnxruntime"}.get(program, program), "torch"):
        pytest.importorskip(package)
    names = ("dense", "small", "inertial", "sorted")
    first, *others = (networks / name for name in names)
    # What is no program is one more checkpoint.
    words = [first, "--against", program, *others, "--batch-sizes", "2"]
    rows, said = measured(capsys, *words)
    assert [row["program"] for row in rows] == 4 * ["jax", program]
    for row in rows[:-1]:
        assert row["gap"] < 1e-5 and row["median_ms"] > 0
    assert "sort" in rows[-1]["refused"] and "median_ms" not in rows[-1]
    assert f"{networks / 'sorted'}, {RUNTIMES[program]}: {rows[-1]['refused']}" in said


@pytest.mark.slow
def test_gates_are_counted_as_they_open_on_the_timed_images(networks, capsys):
    source = f"npz:{networks / 'set.npz'}"
    words = [networks / "inertial", "--data", source, "--batch-sizes", "5", "2"]
    rows, _ = measured(capsys, *words)
    network = read_network(networks / "inertial")
    rates = evaluate_network(network, EvaluationSettings(), source=source).gate_rates
    assert 0.05 < rates["Conv_1"] < 0.95
    assert {row["macs"] for row in rows} == {network.cost(rates).total_macs}
    (open_,), _ = measured(capsys, networks / "inertial", "--batch-sizes", "2")
    assert open_["macs"] == network.cost({"Conv_1": 1.0}).total_macs > rows[0]["macs"]


def test_a_step_of_training_and_another_size_are_timed(networks, capsys):
    words = [networks / "dense", "--batch-sizes", "2", "--train"]
    rows, _ = measured(capsys, *words, "--image-size", "4", "5")
    assert [row["what"] for row in rows] == ["forward", "train"]
    model = read_network(networks / "dense").model
    for row in rows:
        assert row["image_shape"] == [4, 5, 1]
        assert row["macs"] == ij.count_cost(model, (4, 5, 1)).total_macs
        assert row["speedup"] == 1 and row["images_per_s"] > 0


def test_a_step_goes_on_from_the_last_one(networks):
    suite = Suite(checkpoints=(str(networks / "small"),), batch_sizes=(3,))
    step = suite._subject(read_network(networks / "small")).train_call(3)
    states = [int(step()[0].step) for _ in range(3)]
    assert states == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "checkpoints"], "needs a checkpoint"),
        (["nothing"], "there is no checkpoint at nothing"),
        (["nothing", "--against", "touch"], "there is no checkpoint at nothing"),
        (["nothing", "--suite", "ops"], "nothing does nothing with --suite ops;"),
        (["--model.factory", "own_cnn:make"], "does nothing with --suite train;"),
        (["nothing", "--batch-sizes", "4", "0"], r"`batch_sizes` (=(4, 0)) must be"),
        (["nothing", "--repeats", "0"], "`repeats` (=0) must be >= 1."),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(words, said, capsys):
    assert main(["benchmark", *words]) == 2
    assert said in capsys.readouterr().err


def test_sizes_and_data_that_do_not_suit_are_refused(networks, capsys, tmp_path):
    lenet = ij.create_model("lenet", width=0.2)
    seen = Preprocessing((28, 28, 1), (0.5,), (0.25,))
    variables = ij.init_variables(lenet, jax.random.key(0))
    ij.save_checkpoint(tmp_path / "lenet", lenet, variables, metadata=Metadata(seen))
    command = ["benchmark", str(tmp_path / "lenet")]
    assert main([*command, "--image-size", "20", "28"]) == 2
    said = "`image_size` (=(20, 28)) does not suit"
    assert said in capsys.readouterr().err
    source = ["--data", f"npz:{networks / 'set.npz'}"]
    command[1] = str(networks / "dense")
    assert main([*command, "--against", "pytorch"]) == 2
    said = "(=pytorch) must be torch, onnx, openvino, or a checkpoint. Did you mean"
    assert f"{said} torch?" in capsys.readouterr().err
    assert main([*command, *source, "--batch-sizes", "6"]) == 2
    assert "must be at most 5, the test images" in capsys.readouterr().err
