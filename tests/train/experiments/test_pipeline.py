"""From PyTorch weights through compression to fine-tuned networks, and the control."""

import json
import re
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import inertia_jax as ij
from train.__main__ import main
from train.fit.loop import FitResult

pytestmark = pytest.mark.usefixtures("one_device")
CONFIG = "configs/pipelines/cifar100_tucker.py"
SMALL = [
    *("--run.data.source", "digits", "--run.data.image-size", "16"),
    *("--run.data.mean", "0.3", "--run.data.std", "0.4"),
    *("--run.data.eval-resize", "18", "--run.model.width", "0.1"),
    *("--run.epochs", "1", "--head-epochs", "1"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a narrow ResNet18 with torchvision's stem, keys and 1,000 classes."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_weights(file, "resnet18", width=0.1, stem="imagenet")
    return file


def save_weights(file, name, **options):
    model = ij.create_model(name, num_classes=1000, **options)
    variables = ij.init_variables(model, jax.random.key(5), (16, 16, 1))
    save_file(ij.to_torch(model, variables), file)


def pipeline(workdir, *options):
    arguments = ["pipeline", CONFIG, *SMALL, "--workdir", str(workdir), *options]
    return main(arguments)


@pytest.fixture(scope="module")
def done(weights, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pipeline") / "run"
    record = workdir.with_name("record.json")
    options = ["--weights", str(weights), "--record", str(record)]
    assert pipeline(workdir, *options) == 0
    return workdir, json.loads(record.read_text())


def params_at(path):
    _, variables = ij.load_checkpoint(path)
    return variables["params"]


def last(run):
    return max((run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)]
)
def test_a_stop_is_said_and_has_the_code_of_its_signal(
    number, code, weights, tmp_path, monkeypatch, capsys
):
    def stopped(config, *, workdir, resume):
        assert resume
        return FitResult(workdir, 1, None, number)

    monkeypatch.setattr("train.experiments.pipeline.fit", stopped)
    assert pipeline(tmp_path / "run", "--weights", str(weights)) == code
    assert capsys.readouterr().out.endswith(
        "stopped and saved; the same command goes on.\n"
    )


@pytest.mark.slow
def test_stages_are_those_of_the_original_and_a_control(done):
    _, record = done
    names = [stage["name"] for stage in record["stages"]]
    assert names == [
        "head trained",
        "compressed, ratio:0.2",
        "fine-tuned, ratio:0.2",
        "dense, fine-tuned as long",
    ]
    macs = [stage["macs"] for stage in record["stages"]]
    assert macs[0] == macs[3] > 3 * macs[1] == 3 * macs[2]
    assert record["stages"][0]["plan"] == record["stages"][3]["plan"] == []
    # All twenty convolutions, at a fifth of their channels.
    plan = {path: spec for path, spec in record["stages"][1]["plan"]}
    assert len(plan) == 20
    assert (plan["conv1"]["rank_in"], plan["conv1"]["rank_out"]) == (1, 1)
    downsample = plan["layer4_0/downsample_0"]
    assert (downsample["rank_in"], downsample["rank_out"]) == (5, 10)


@pytest.mark.slow
def test_only_the_head_is_new_and_only_the_head_is_trained(done, weights):
    workdir, _ = done
    imported, head = params_at(workdir / "imported"), params_at(last(workdir / "head"))
    flat = {
        "/".join(str(k.key) for k in path): leaf
        for path, leaf in jax.tree.leaves_with_path(imported)
    }
    after = {
        "/".join(str(k.key) for k in path): leaf
        for path, leaf in jax.tree.leaves_with_path(head)
    }
    moved = {name for name in flat if (flat[name] != after[name]).any()}
    assert moved == {"fc/kernel", "fc/bias"}
    assert flat["fc/kernel"].shape[1] == 10
    model = ij.create_model("resnet18", num_classes=1000, width=0.1, stem="imagenet")
    original = ij.load_torch(model, weights, image_shape=(16, 16, 1))["params"]
    assert (original["conv1"]["kernel"] == imported["conv1"]["kernel"]).all()


@pytest.mark.slow
def test_fine_tuning_moves_the_factors(done):
    workdir, _ = done
    before = params_at(workdir / "compressed_1")["layer1_0"]["conv1"]
    after = params_at(last(workdir / "tuned_1"))["layer1_0"]["conv1"]
    assert set(before) == {"u_in", "core", "u_out"}
    for part in before:
        assert (before[part]["kernel"] != after[part]["kernel"]).any()


@pytest.mark.slow
def test_networks_are_compressed_as_the_verb_compresses(done, tmp_path):
    workdir, _ = done
    out = tmp_path / "compressed"
    options = ["--ranks", "ratio:0.2", "--no-weigh", "--recalibration-images", "0"]
    dense = last(workdir / "head")
    assert main(["compress", str(dense), *options, "--out", str(out)]) == 0
    both = [ij.load_checkpoint(path) for path in (workdir / "compressed_1", out)]
    assert both[0][0] == both[1][0]
    jax.tree.map(np.testing.assert_array_equal, both[0][1], both[1][1])


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(done, capsys):
    workdir, record = done
    steps = sorted(path.name for path in workdir.glob("*/checkpoints/*"))
    assert pipeline(workdir) == 0
    assert sorted(path.name for path in workdir.glob("*/checkpoints/*")) == steps
    printed = capsys.readouterr().out
    for stage in record["stages"]:
        assert re.search(rf"{stage['name']} +{100 * stage['top1']:.2f}%", printed)


@pytest.mark.slow
def test_other_settings_in_the_same_place_are_refused(done, capsys):
    workdir, _ = done
    assert pipeline(workdir, "--ranks", "ratio:0.3") == 2
    assert "other settings; nothing was changed" in capsys.readouterr().err


@pytest.mark.slow
def test_other_weights_in_the_same_place_are_refused(done, tmp_path, capsys):
    workdir, _ = done
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    assert pipeline(workdir, "--weights", str(other)) == 2
    assert "of other weights than" in capsys.readouterr().err
    # Weights that were read before are not needed again.
    assert pipeline(workdir, "--weights", str(tmp_path / "none")) == 0
    assert "is not there any more" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_input_claims_no_directory(weights, tmp_path, capsys):
    workdir, given = tmp_path / "run", ["--weights", str(weights)]
    for options, message in (
        (["--run.data.source", "npz:none.npz", *given], "no file none.npz"),
        (["--run.batch-size", "8000", *given], "`batch_size`"),
        (["--weights", str(tmp_path / "none.safetensors")], "no weights file"),
        (["--record", str(tmp_path / "no" / "x.json"), *given], "does not exist"),
    ):
        assert pipeline(workdir, *options) == 2
        assert message in capsys.readouterr().err
        assert not workdir.exists()
    workdir.mkdir()
    (workdir / "notes.txt").write_text("mine")
    assert pipeline(workdir, *given) == 2
    assert "exists and holds no pipeline" in capsys.readouterr().err
    (workdir / "notes.txt").unlink()
    (workdir / "pipeline.json").write_text("")
    assert pipeline(workdir, *given) == 2
    assert "pipeline.json is no JSON" in capsys.readouterr().err
    (workdir / "pipeline.json").write_text("[]")
    assert pipeline(workdir, *given) == 2
    assert "pipeline.json holds no pipeline" in capsys.readouterr().err


def test_what_stages_set_themselves_is_refused(tmp_path, capsys):
    assert pipeline(tmp_path / "a", "--run.teacher", "somewhere") == 2
    assert "`run.teacher` (=somewhere) must not be set" in capsys.readouterr().err
    assert pipeline(tmp_path / "a", "--run.new-head") == 2
    assert "`run.new_head` (=True) must not be set" in capsys.readouterr().err


def test_weights_are_asked_for_and_rules_are_checked_first(tmp_path, capsys):
    assert pipeline(tmp_path / "a") == 2
    assert "`weights` must name" in capsys.readouterr().err
    assert pipeline(tmp_path / "b", "--ranks", "half") == 2
    assert "`ranks` (=half)" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_compressing_in_rounds(tmp_path):
    # LeNet, of which four steps and their teachers are compiled in seconds.
    record, weights = tmp_path / "record.json", tmp_path / "lenet.safetensors"
    save_weights(weights, "lenet", width=0.25)
    options = ["--ranks", "ratio:0.6", "ratio:0.3", "--no-control", "--distill"]
    options += ["--run.model.name", "lenet", "--run.model.stem", "cifar"]
    options += ["--run.model.width", "0.25", "--head", "fc2"]
    options += ["--recalibration-images", "64", "--weights", str(weights)]
    assert pipeline(tmp_path / "run", *options, "--record", str(record)) == 0
    stages = json.loads(record.read_text())["stages"]
    assert len(stages) == 5
    assert stages[1]["macs"] == stages[2]["macs"] > stages[3]["macs"]
