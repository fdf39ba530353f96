"""Networks are compared on images that none of them was trained on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import inertia_jax as ij
from inertia_jax.metadata import Metadata, Preprocessing
from train.__main__ import main
from train.compress.options import Compress
from train.compress.stages import load_training_images
from train.config import Config, Data
from train.config_file import config_to_json
from train.data import load_data
from train.data.held_out import HeldOut
from train.errors import UsageError
from train.evaluate import checkpoint
from train.evaluate.checkpoint import evaluate_network, held_out_of_all
from train.evaluate.evaluation import paired_difference
from train.evaluate.settings import EvaluationSettings
from train.networks import read_network
from train.side_by_side import compare_answers

pytestmark = pytest.mark.usefixtures("one_device")

SHAPE = (10, 10, 1)
NAMES = tuple("abcdefghij")


def save_images(path, *, has_test=False, names=NAMES):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = rng.integers(256, size=(60, *SHAPE)).astype(np.uint8)
    arrays = {"x_train": images, "y_train": labels, "label_names": list(names)}
    if has_test:
        arrays |= {"x_test": images[:20], "y_test": labels[:20]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return f"npz:{path}"


def save_trained(path, source, *, names=NAMES, seed=0, **shares):
    """Saves what a run on a source would, without training it."""
    model = ij.create_model("lenet", width=0.1)
    variables = ij.init_variables(model, jax.random.key(0), SHAPE)
    if names != NAMES:  # the same answers, under other numbers
        order = np.array([NAMES.index(name) for name in names])
        last = variables["params"]["fc2"]
        variables["params"]["fc2"] = {n: leaf[..., order] for n, leaf in last.items()}
    config = Config(data=Data(source, mean=(0.5,), std=(0.25,), **shares))
    info = {"config": config_to_json(config)}
    if shares:
        data = load_data(
            source,
            cache_dir="unused",
            image_size=None,
            held_out=HeldOut.of(config.data),
        )
        info["data"] = {"held_out": dict(data.held_out)}
    about = Metadata(Preprocessing(SHAPE, (0.5,), (0.25,)), tuple(names), info)
    ij.save_checkpoint(path, model, variables, metadata=about)
    return str(path)


@pytest.fixture
def runs(tmp_path):
    """The checkpoints of three draws of test images out of one source, and of none."""
    source = save_images(tmp_path / "set.npz")
    draws = {
        "a": {"test_share": 0.3},
        "b": {"test_share": 0.3, "split_seed": 7},
        "c": {"test_share": 0.5},
        "like_a": {"test_share": 0.3},
    }
    saved = {n: save_trained(tmp_path / n, source, **d) for n, d in draws.items()}
    other = save_images(tmp_path / "other.npz", has_test=True)
    return {**saved, "other": save_trained(tmp_path / "of_other", other)}


def test_a_report_tests_each_network_on_what_it_held_out(runs, tmp_path):
    names = ["a", "b", "c", "like_a"]
    out = str(tmp_path / "report")
    assert main(["report", *(runs[name] for name in names), "--out", out]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["subjects"]
    for name, subject in zip(names, found, strict=True):
        alone = evaluate_network(read_network(tmp_path / name), EvaluationSettings())
        assert subject["evaluation"]["confusion"] == alone.confusion.tolist()
        assert subject["evaluation"]["num_examples"] == alone.num_examples
    # The same weights: only the images differ.
    assert [s["difference"] for s in found] == [0.0, None, None, 0.0]
    page = (tmp_path / "report.html").read_text()
    for networks in ("1, 4", "2", "3"):
        assert f"set.npz, networks {networks}. Every class." in page


@pytest.mark.parametrize("verb", ["evaluate", "diff"])
def test_answers_to_other_images_are_not_compared(verb, runs, tmp_path, capsys):
    def words(first, second):
        if verb == "evaluate":
            return ["evaluate", runs[first], "--against", runs[second]]
        source = f"npz:{tmp_path / 'set.npz'}"
        return ["diff", runs[first], runs[second], "--data", source]

    for second in ("b", "c"):
        assert main(words("a", second)) == 2
        said = capsys.readouterr()
        assert "held other images of npz:" in said.err
        assert "top-1" not in said.out
    # What another source's network is tested on is the first one's, which it never saw.
    for second in ("like_a", "other"):
        assert main(words("a", second)) == 0
        assert "+0.00" in capsys.readouterr().out


def test_what_differs_is_never_paired(runs, tmp_path):
    settings = EvaluationSettings()
    first, second = (
        evaluate_network(read_network(tmp_path / name), settings) for name in "ab"
    )
    assert first.num_examples == second.num_examples
    with pytest.raises(ValueError, match="of other test images"):
        paired_difference(first, second)
    networks = [read_network(tmp_path / name) for name in ("a", "like_a", "of_other")]
    held_out = held_out_of_all(networks, f"npz:{tmp_path / 'set.npz'}")
    assert (held_out.test_share, held_out.seed) == (0.3, 0)
    assert held_out_of_all(networks, "npz:third.npz") == HeldOut()


def test_classes_in_another_order_are_the_same_classes(tmp_path):
    source = save_images(tmp_path / "set.npz", has_test=True)
    orders = {"first": NAMES, "second": NAMES[::-1]}
    for name, order in orders.items():
        save_trained(tmp_path / name, source, names=order)
    found = [
        evaluate_network(read_network(tmp_path / name), EvaluationSettings())
        for name in orders
    ]
    answers = compare_answers(*found)
    assert answers["num_differing"] == 0 and answers["changes"] == []
    # Names that do not tell the classes leave the numbers.
    unnamed = [dataclasses.replace(one, class_names=("a",) * 10) for one in found]
    assert compare_answers(*unnamed)["num_differing"] > 0


def test_a_source_of_the_same_name_has_its_own_test_images(tmp_path):
    trained = save_images(tmp_path / "set.npz")
    save_trained(tmp_path / "run", trained, test_share=0.3)
    other = save_images(tmp_path / "elsewhere" / "set.npz", has_test=True)
    found = evaluate_network(
        read_network(tmp_path / "run"), EvaluationSettings(), source=other
    )
    assert found.num_examples == 20 and found.held_out is None
    # Where it is the training's own source, nobody can tell any more what was held out.
    save_images(tmp_path / "set.npz", has_test=True)
    network = read_network(tmp_path / "run")
    with pytest.raises(UsageError, match="test images of its own"):
        evaluate_network(network, EvaluationSettings())
    args = Compress(checkpoint="run", out="out", ranks="ratio:0.5", data=trained)
    with pytest.raises(UsageError, match="test images of its own"):
        load_training_images(args, network)
    # To hold some out is still refused where the user asks for it.
    with pytest.raises(UsageError, match="test images of its own"):
        load_data(
            other, cache_dir="unused", image_size=None, held_out=HeldOut(test_share=0.3)
        )


def test_decoded_sets_are_looked_for_where_the_training_kept_them(tmp_path):
    source = save_images(tmp_path / "set.npz", has_test=True)
    for name, is_here in (("here", True), ("gone", False)):
        place = tmp_path / f"cache_{name}"
        if is_here:
            place.mkdir()
        save_trained(tmp_path / name, source, cache_dir=str(place))
        expected = str(place) if is_here else Data.cache_dir
        assert read_network(tmp_path / name).cache_dir == expected
    # What is no place is none of a reader's faults.
    for number, wrong in enumerate(("~nobodyx/data", 3, None)):
        config = Config(data=Data(source, mean=(0.5,), std=(0.25,)))
        info = {"config": config_to_json(config)}
        info["config"]["data"]["cache_dir"] = wrong
        network = read_network(tmp_path / "here")
        changed = dataclasses.replace(network, info=info)
        assert changed.cache_dir == Data.cache_dir, number


def test_evaluate_reads_what_the_training_decoded(tmp_path, monkeypatch):
    source = save_images(tmp_path / "set.npz", has_test=True)
    (tmp_path / "cache").mkdir()
    save_trained(tmp_path / "run", source, cache_dir=str(tmp_path / "cache"))
    asked, load = [], checkpoint.load_data

    def remember(*args, cache_dir, **options):
        asked.append(cache_dir)
        return load(*args, cache_dir=cache_dir, **options)

    monkeypatch.setattr(checkpoint, "load_data", remember)
    for settings in (EvaluationSettings(), EvaluationSettings(cache_dir="mine")):
        evaluate_network(read_network(tmp_path / "run"), settings)
    assert asked == [str(tmp_path / "cache"), "mine"]
