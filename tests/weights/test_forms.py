"""The forms in which people save a network's weights go in, with PyTorch's numbers."""

import io
import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import shared_file
from flax import serialization
from flax.training.train_state import TrainState
from helpers import exact_cifar10

import inertia_jax as ij
from train.__main__ import main

torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
safetensors = pytest.importorskip("safetensors.torch")

STATISTICS = ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")


def renamed(state, *pairs, prefix=""):
    """Returns weights by keys in which parts have new names."""
    named = {}
    for key, value in state.items():
        for old, new in pairs:
            key = re.sub(rf"(?<![^.]){old}(?![^.])", new, key)
        named[f"{prefix}{key}"] = value
    return named


def counted(state, prefix=""):
    """Returns weights with the counters that BatchNorm has in PyTorch."""
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(3)
        for key in state
        if key.endswith("running_mean")
    }
    return renamed(state | counters, prefix=prefix)


def shifted(state):
    """Returns other weights of the same network."""
    return {key: value + 1 for key, value in state.items()}


def module_of(state):
    """Returns a module that has these weights, to be pickled as a whole."""
    root = torch.nn.Module()
    for key, value in state.items():
        *path, leaf = key.split(".")
        place = root
        for name in path:
            if name not in place._modules:
                place.add_module(name, torch.nn.Module())
            place = place._modules[name]
        if leaf.startswith("running"):
            place.register_buffer(leaf, value)
        else:
            place.register_parameter(leaf, torch.nn.Parameter(value))
    return root


def on_cuda(content, *, is_zip):
    """Returns the bytes of a file whose tensors were saved on a GPU."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    place, cuda = (b"X" + bytes([len(x), 0, 0, 0]) + x for x in (b"cpu", b"cuda:0"))
    if not is_zip:
        return buffer.getvalue().replace(place, cuda)
    moved = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(moved, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            assert place in data or not info.filename.endswith("data.pkl")
            new.writestr(info.filename, data.replace(place, cuda))
    return moved.getvalue()


def sharded(state, path, save):
    """Writes weights as two files and their index."""
    keys = sorted(state)
    parts = {"a": keys[: len(keys) // 2], "b": keys[len(keys) // 2 :]}
    for name, part in parts.items():
        save({key: state[key] for key in part}, path.with_name(f"{name}.bin"))
    places = {key: f"{name}.bin" for name, part in parts.items() for key in part}
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def train_state(variables):
    params, tx = variables["params"], optax.sgd(0.1, momentum=0.9)

    class State(TrainState):
        batch_stats: dict

    return State.create(
        apply_fn=None, params=params, tx=tx, batch_stats=variables["batch_stats"]
    )


def orbax_tree(tree, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def orbax_step(tree, path):
    with ocp.CheckpointManager(path.absolute()) as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))


CHENYAOFO = (("linear", "fc"), ("shortcut", "downsample"))
BESIDE = (("^(conv1|bn1|layer1|layer2|layer3)", r"backbone.\1"), ("linear", "head"))
WEIAICUNZAI = (
    (r"(layer\d\.\d)\.conv(\d)", r"\1.residual_function.\2.0"),
    (r"(layer\d\.\d)\.bn(\d)", r"\1.residual_function.\2.1"),
    (r"layer(\d)", r"conv\1_x"),
)
WEIAICUNZAI_BACK = (
    *("conv*_x=layer*", "residual_function.*.0=conv*", "residual_function.*.1=bn*"),
)
# How each form is written: a function of the weights and the path.
PYTORCH = {
    "plain.pth": lambda s, p: torch.save(s, p),
    "counters.pt": lambda s, p: torch.save(counted(s), p),
    "before-zip.th": lambda s, p: torch.save(
        s, p, _use_new_zipfile_serialization=False
    ),
    "huggingface.bin": lambda s, p: torch.save(renamed(s, prefix="model."), p),
    "akamaster.th": lambda s, p: torch.save(
        {"state_dict": counted(s, "module."), "best_prec1": 91.7}, p
    ),
    "imagenet-example.pth.tar": lambda s, p: torch.save(
        {
            "epoch": 90,
            "arch": "resnet20",
            "state_dict": counted(s, "module."),
            "best_acc1": torch.tensor(91.7),
            "optimizer": torch.optim.SGD(module_of(s).parameters(), 0.1).state_dict(),
        },
        p,
    ),
    "kuangliu.pth": lambda s, p: torch.save(
        {"net": counted(s, "module."), "acc": 91.7, "epoch": 199}, p
    ),
    "chenyaofo.pt": lambda s, p: torch.save(renamed(counted(s), *CHENYAOFO), p),
    "classifier.pth": lambda s, p: torch.save(renamed(s, ("linear", "classifier")), p),
    "head.pth": lambda s, p: torch.save(renamed(s, ("linear", "head")), p),
    "model.pt": lambda s, p: torch.save({"model": renamed(s, prefix="_orig_mod.")}, p),
    "model_state.pth": lambda s, p: torch.save({"model_state": s, "epoch": 3}, p),
    "params_ema.pth": lambda s, p: torch.save({"params_ema": s}, p),
    "lightning.ckpt": lambda s, p: torch.save(
        {
            "state_dict": counted(s, "model."),
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.9)}},
        },
        p,
    ),
    "backbone-and-head.ckpt": lambda s, p: torch.save(
        {"state_dict": renamed(counted(s), *BESIDE)}, p
    ),
    "encoder.pth": lambda s, p: torch.save(renamed(s, prefix="encoder."), p),
    "all-prefixes.pth": lambda s, p: torch.save(
        {"model_state": counted(s, "module._orig_mod.model.backbone.encoder.")}, p
    ),
    "cuda.pth": lambda s, p: p.write_bytes(on_cuda(s, is_zip=True)),
    "cuda-before-zip.pth": lambda s, p: p.write_bytes(on_cuda(s, is_zip=False)),
    "network.pth": lambda s, p: torch.save(module_of(s), p),
    "data-parallel.pth": lambda s, p: torch.save(
        {"model": torch.nn.DataParallel(module_of(s))}, p
    ),
    "plain.safetensors": lambda s, p: safetensors.save_file(s, p),
    "model.safetensors.index.json": lambda s, p: sharded(s, p, safetensors.save_file),
    "pytorch_model.bin.index.json": lambda s, p: sharded(s, p, torch.save),
}
# Forms of which more must be said: options of the command, and what is said.
ASKED = {
    "torchvision-ema.pth": (
        lambda s, p: torch.save(
            {"model": shifted(s), "model_ema": counted(s, "module.module.")}, p
        ),
        ["--ema"],
        "the weights at `model_ema` are taken, not those at `model`",
    ),
    "basicsr.pth": (
        lambda s, p: torch.save({"params": shifted(s), "params_ema": s}, p),
        ["--ema"],
        "the weights at `params_ema` are taken, not those at `params`",
    ),
    "weiaicunzai.pth": (
        lambda s, p: torch.save(renamed(s, *WEIAICUNZAI), p),
        ["--rename", *WEIAICUNZAI_BACK],
        "",
    ),
}
# Types that become float32, which is said.
NARROW = {
    "half.pth": (lambda s, p: torch.save(s, p), "float16"),
    "bfloat16.pt": (lambda s, p: torch.save({"model": s}, p), "bfloat16"),
    "bfloat16.safetensors": (lambda s, p: safetensors.save_file(s, p), "bfloat16"),
}
FLAX = {
    "variables.msgpack": lambda v, p: p.write_bytes(serialization.to_bytes(v)),
    "train-state.msgpack": lambda v, p: p.write_bytes(
        serialization.to_bytes(train_state(v))
    ),
    "orbax": orbax_tree,
    "orbax-manager": lambda v, p: orbax_step(train_state(v), p),
}


@pytest.fixture(scope="module")
def small():
    """A narrow network, its variables, and PyTorch's tensors of them."""
    model = ij.create_model("resnet20", width=0.25, shortcut="B")
    variables = ij.init_variables(model, jax.random.key(0))
    exported = ij.to_torch(model, variables)
    return model, variables, {k: torch.from_numpy(v) for k, v in exported.items()}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.mark.parametrize("name", PYTORCH)
def test_forms_of_pytorch_are_read_as_they_are(name, small, tmp_path):
    model, variables, state = small
    PYTORCH[name](state, tmp_path / name)
    assert_equal(ij.load_torch(model, tmp_path / name), variables)


@pytest.mark.parametrize("name", FLAX)
def test_forms_of_flax_are_read_as_they_are(name, small, tmp_path):
    model, variables, _ = small
    FLAX[name](variables, tmp_path / name)
    assert_equal(ij.load_torch(model, tmp_path / name), variables)


@pytest.mark.parametrize("name", ASKED)
def test_forms_with_a_choice_are_read_as_asked_for(name, small, tmp_path, capsys):
    _, variables, state = small
    write, options, said = ASKED[name]
    write(state, tmp_path / name)
    out = str(tmp_path / "out")
    command = ["import", str(tmp_path / name), "--model", "resnet20", *STATISTICS]
    command += ["--width", "0.25", "--shortcut", "B", "--out", out]
    assert main([*command, *options]) == 0
    assert said in capsys.readouterr().out
    assert_equal(ij.load_checkpoint(out)[1], variables)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_types_are_widened_if_asked_for_and_said(name, small, tmp_path):
    model, _, state = small
    write, dtype = NARROW[name]
    narrow = {key: value.to(getattr(torch, dtype)) for key, value in state.items()}
    write(narrow, tmp_path / name)
    kept = ij.load_torch(model, tmp_path / name)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(kept)} == {dtype}
    with pytest.warns(UserWarning, match=f"weights of {dtype} become float32"):
        widened = ij.load_torch(model, tmp_path / name, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {jnp.dtype("float32")}
    assert_equal(widened, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kept))


def torch_logits(state, images):
    """Returns the logits of ResNet20 in PyTorch, of images with channels first."""
    functional = torch.nn.functional

    def conv_norm(x, conv, norm, stride=1):
        kernel = state[f"{conv}.weight"]
        x = functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2)
        leaves = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"{norm}.{leaf}"] for leaf in leaves))

    x = conv_norm(images, "conv1", "bn1").relu()
    for stage in range(1, 4):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            y = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:  # option A
                more = x.shape[1] // 2
                x = functional.pad(x[..., ::2, ::2], (0, 0, 0, 0, more, more))
            x = (x + y).relu()
    weight, bias = state["linear.weight"], state["linear.bias"]
    return functional.linear(x.mean((2, 3)), weight, bias)


@pytest.mark.slow
def test_every_form_of_a_real_network_scores_as_in_pytorch(tmp_path, capsys, optimised):
    loaded = torch.load(shared_file("weights/resnet20_cifar10.pth"), map_location="cpu")
    model = ij.create_model("resnet20")
    variables = ij.load_torch(model, loaded)
    state = {k: torch.from_numpy(v) for k, v in ij.to_torch(model, variables).items()}
    with np.load(exact_cifar10(tmp_path).removeprefix("npz:")) as data:
        pixels, labels = data["x_test"], data["y_test"].ravel()
    mean, std = (np.array(STATISTICS[i : i + 3], np.float32) for i in (1, 5))
    images = (pixels.astype(np.float32) / 255 - mean) / std
    apply = jax.jit(lambda variables: model.apply(variables, images, train=False))

    def pytorch(weights):
        with torch.no_grad():
            channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2))
            return torch_logits(weights, channels_first).numpy()

    forms = {name: (write, state, []) for name, write in PYTORCH.items()}
    forms |= {
        name: (write, state, options) for name, (write, options, _) in ASKED.items()
    }
    forms |= {name: (write, variables, []) for name, write in FLAX.items()}
    for name, (write, dtype) in NARROW.items():
        narrow = {k: v.to(getattr(torch, dtype)) for k, v in state.items()}
        forms[name] = (write, narrow, [])
    # Most forms give the same variables, which are scored once.
    expected, found, scored = {}, {}, {}
    for number, (name, (write, weights, options)) in enumerate(forms.items()):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        write(weights, folder / name)
        command = ["import", str(folder / name), "--model", "resnet20", *STATISTICS]
        assert main([*command, *options, "--out", str(folder / "out")]) == 0
        said = capsys.readouterr().out
        _, imported = ij.load_checkpoint(folder / "out")
        content = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(imported))
        if content not in scored:
            scored[content] = np.asarray(apply(imported))
        logits = scored[content]
        dtype = NARROW[name][1] if name in NARROW else "float32"
        if name in NARROW:
            assert f"weights of {dtype} become float32" in said
        if dtype not in expected:
            rounded = {k: v.to(getattr(torch, dtype)).float() for k, v in state.items()}
            expected[dtype] = pytorch(rounded)
        theirs = expected[dtype]
        correct = [int((x.argmax(1) == labels).sum()) for x in (logits, theirs)]
        found[name] = (*correct, np.abs(logits - theirs).max() / np.abs(theirs).max())
    with capsys.disabled():
        print()
        for name, (ours, theirs, gap) in found.items():
            print(f"{name:32} {ours} of {len(labels)}, PyTorch {theirs}, gap {gap:.0e}")
    assert len(found) >= 34
    for name, (ours, theirs, gap) in found.items():
        assert ours == theirs, name
        # Sums in another order.
        assert gap < 1e-4, name
