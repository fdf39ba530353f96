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


def test_bad_files_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        ij.load_torch(model, tmp_path / "none.pth")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must end in \.pth"):
        ij.load_torch(model, tmp_path / "weights.h5")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no safetensors file"):
        ij.load_torch(model, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="must be arrays"):
        ij.load_torch(model, {"epoch": 3})


def test_a_broken_pth_is_named(model, tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    with pytest.raises(ValueError, match="holds no PyTorch weights"):
        ij.load_torch(model, tmp_path / "broken.pth")


def test_foreign_variables_are_not_exported(model):
    with pytest.raises(ValueError, match="do not belong"):
        ij.to_torch(model, {"params": {"conv1": {"kernel": np.zeros((3, 3, 3, 4))}}})
