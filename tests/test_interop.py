"""PyTorch weights, both ways."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import shared_file
from safetensors.numpy import save_file

import inertia_jax as ij


@pytest.fixture(scope="module")
def model():
    return ij.create_model("resnet20", width=0.25, shortcut="B")


@pytest.fixture(scope="module")
def variables(model):
    return ij.init_variables(model, jax.random.key(0))


@pytest.fixture
def state(model, variables):
    return ij.to_torch(model, variables)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.mark.slow
def test_there_and_back_is_the_same(model, variables, state):
    assert_equal(ij.load_torch(model, state), variables)
    assert state["layer2.0.shortcut.0.weight"].shape == (8, 4, 1, 1)
    assert state["linear.weight"].shape == (10, 16)


@pytest.mark.slow
def test_names_and_shapes_are_torchvisions():
    file = shared_file("reference/torchvision_resnet18_state_dict.json")
    theirs = {
        key: tuple(shape)
        for key, shape in json.loads(file.read_text()).items()
        if not key.endswith("num_batches_tracked")
    }
    model = ij.create_model("resnet18", stem="imagenet", num_classes=1000)
    ours = ij.to_torch(model, ij.init_variables(model, jax.random.key(0)))
    assert {key: value.shape for key, value in ours.items()} == theirs


def test_files_of_every_kind_are_read(model, variables, state, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    tensors = {f"module.{key}": torch.from_numpy(v) for key, v in state.items()}
    tensors["module.bn1.num_batches_tracked"] = torch.tensor(3)
    torch.save(tensors, tmp_path / "plain.pth")
    torch.save({"net": tensors, "acc": 91.7}, tmp_path / "nested.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("plain.pth", "nested.pt", "weights.safetensors"):
        assert_equal(ij.load_torch(model, tmp_path / name), variables)


@pytest.mark.slow
def test_pytorch_takes_what_we_export():
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    from train.benchmark.torch_models import TORCH_MODELS

    model = ij.create_model("lenet")
    variables = ij.init_variables(model, jax.random.key(0))
    twin = TORCH_MODELS["lenet"]().eval()
    exported = ij.to_torch(model, variables)
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in exported.items()})
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype(np.float32)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    ours = model.apply(variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_network_that_was_saved_whole_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    from train.benchmark.torch_models import TORCH_MODELS

    twin, model = TORCH_MODELS["lenet"](), ij.create_model("lenet")
    expected = ij.load_torch(model, twin.state_dict())
    wrapped = torch.nn.DataParallel(twin)
    for name, is_zip in (("new.pth", True), ("old.pth", False)):
        content = {"model": wrapped, "optimizer": torch.optim.SGD(twin.parameters())}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=is_zip)
        assert_equal(ij.load_torch(model, tmp_path / name), expected)


def test_types_are_kept(model, state):
    halved = {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}
    leaves = jax.tree.leaves(ij.load_torch(model, halved))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_and_float64_tensors_are_read(model, state, x64):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    for dtype in (torch.bfloat16, torch.float64):
        tensors = {k: torch.from_numpy(v).to(dtype) for k, v in state.items()}
        loaded = ij.load_torch(model, tensors)["params"]["conv1"]["kernel"]
        assert str(loaded.dtype) == str(dtype).removeprefix("torch.")
        expected = tensors["conv1.weight"].float().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(np.asarray(loaded, np.float32), expected)


def test_one_error_lists_every_key_that_does_not_fit(model, state):
    del state["bn1.weight"]
    state["extra.weight"] = np.zeros(3, np.float32)
    state["linear.weight"] = np.zeros((7, 16), np.float32)
    with pytest.raises(ValueError, match=r"\(3 keys\)") as error:
        ij.load_torch(model, state)
    text = str(error.value)
    assert "missing bn1.weight (4,)" in text
    assert "surplus extra.weight (3,)" in text
    assert "misshapen linear.weight (7, 16), must be (10, 16)" in text


def test_a_new_head_is_asked_for_by_name(model, variables, state):
    state["linear.weight"] = np.zeros((100, 16), np.float32)
    del state["linear.bias"]
    key = jax.random.key(1)
    loaded = ij.load_torch(model, state, reinitialise=("linear",), key=key)
    assert loaded["params"]["linear"]["kernel"].shape == (16, 10)
    assert np.abs(loaded["params"]["linear"]["kernel"]).max() > 0
    assert_equal(loaded["params"]["layer1_0"], variables["params"]["layer1_0"])
    with pytest.raises(ValueError, match="`key`"):
        ij.load_torch(model, state, reinitialise=("linear",))
    with pytest.raises(ValueError, match="'fc'.*matches no key"):
        ij.load_torch(model, state, reinitialise=("fc",), key=key)


def test_a_file_of_no_weights_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        ij.load_torch(model, tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    with pytest.raises(ValueError, match="broken.pth holds no weights"):
        ij.load_torch(model, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="no arrays"):
        ij.load_torch(model, {"epoch": 3})


def test_errors_of_what_a_file_holds_name_it(model, tmp_path):
    path = tmp_path / "foreign.bin"
    save_file({"x.weight": np.zeros(3, np.float32)}, path)
    for options, message in (({}, "the weights do not"), ({"ema": True}, "`ema`")):
        with pytest.raises(ValueError, match=f"foreign.bin: {message}"):
            ij.load_torch(model, path, **options)


def test_a_home_directory_is_known(model, variables, state, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(state, tmp_path / "weights.bin")
    assert_equal(ij.load_torch(model, "~/weights.bin"), variables)


def test_one_error_names_all_numbers_that_no_network_computes_with(model, state):
    state["conv1.weight"] = state["conv1.weight"].astype(np.int8)
    state["bn1.weight"][0] = np.nan
    state["bn1.running_var"][1] = -1
    with pytest.raises(ValueError, match=r"\(3 keys\)") as error:
        ij.load_torch(model, state)
    text = str(error.value)
    assert "conv1.weight holds int8" in text
    assert "bn1.weight holds NaN or infinity 1 times in 4" in text
    assert "bn1.running_var is negative 1 times" in text


def test_averaged_weights_are_taken_if_asked_for(model, variables, state):
    both = {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}
    with pytest.warns(UserWarning, match="not those at `model_ema`; `ema`"):
        assert_equal(ij.load_torch(model, both), variables)
    with pytest.warns(UserWarning, match="`model_ema` are taken"):
        averaged = ij.load_torch(model, both, ema=True)
    assert_equal(averaged, jax.tree.map(lambda leaf: leaf + 1, variables))


def test_another_spelling_is_guessed_and_renamed(model, variables, state):
    names = {"linear": "top", "shortcut": "identity"}
    foreign = {}
    for key, value in state.items():
        parts = (names.get(part, part) for part in key.split("."))
        foreign[".".join(parts)] = value
    with pytest.raises(ValueError, match=r"\(24 keys\)") as error:
        ij.load_torch(model, foreign)
    lines = str(error.value).split("\n  ")[1:]
    assert [line.split()[1] for line in lines] == ["identity=shortcut", "top=linear"]
    rename = {"top": "linear", "identity": "shortcut"}
    assert_equal(ij.load_torch(model, foreign, rename=rename), variables)


def test_types_that_numpy_lacks_are_exported_as_float32(model, variables, state):
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        narrow = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), variables)
        exported = ij.to_torch(model, narrow)
        for key, value in exported.items():
            assert value.dtype == np.float32
            expected = state[key].astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(value, expected)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), variables)
    assert {v.dtype for v in ij.to_torch(model, halved).values()} == {np.dtype("f2")}


def test_pytorch_takes_bfloat16_and_batch_norm_strictly(model, variables):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    exported = ij.to_torch(model, narrow)
    tensors = {key: torch.from_numpy(value) for key, value in exported.items()}
    norm = torch.nn.BatchNorm2d(4)
    norm.load_state_dict(
        {k.removeprefix("bn1."): v for k, v in tensors.items() if k.startswith("bn1.")}
    )


def test_gates_that_pytorch_lacks_are_said():
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    plan = ij.Plan((("conv2", ij.Inertial(3, 4, reading="tiled")),))
    model = ij.create_model("lenet", width=0.1, plan=plan)
    variables = ij.init_variables(model, jax.random.key(0))
    with pytest.warns(UserWarning, match="in place of conv2 give other outputs"):
        exported = ij.to_torch(model, variables)
    conv = torch.nn.Conv2d(*exported["conv2.weight"].shape[1::-1], 3)
    start = "conv2."
    part = {
        key.removeprefix(start): torch.from_numpy(value)
        for key, value in exported.items()
        if key.startswith(start)
    }
    with pytest.raises(RuntimeError, match="Unexpected key.*threshold"):
        conv.load_state_dict(part)


def test_foreign_variables_are_not_exported(model):
    with pytest.raises(ValueError, match="do not belong"):
        ij.to_torch(model, {"params": {"conv1": {"kernel": np.zeros((3, 3, 3, 4))}}})
