"""Trees that Flax's users save are read by what they hold, and take bounded memory."""

import json
import os
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from safetensors.numpy import save_file

from inertia_jax.weights.files import read_weights_file

msgpack = serialization.msgpack
KERNEL = np.arange(24, dtype=np.float32).reshape(2, 1, 3, 4)
TREE = {
    "params": {"layer1_0": {"conv1": {"kernel": KERNEL}}, "fc": {"bias": np.ones(2)}},
    "batch_stats": {"bn1": {"mean": np.zeros(3)}},
}


def save(tree, path):
    path.write_bytes(serialization.to_bytes(tree))
    return path


def test_names_and_axes_become_pytorchs(tmp_path):
    loaded = read_weights_file(save(TREE, tmp_path / "x.pth"))
    assert list(loaded) == ["layer1.0.conv1.weight", "fc.bias", "bn1.running_mean"]
    expected = KERNEL.transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(loaded["layer1.0.conv1.weight"], expected)


def test_what_training_keeps_beside_the_weights_is_left_out(tmp_path):
    state = {"step": np.int32(3), "rng": np.zeros(2, np.uint32), "apply": None}
    state |= {**TREE, "opt_state": {"0": {"trace": TREE["params"]}}}
    state["ema_params"] = {"fc": {"bias": {"value": np.zeros(2)}}}
    loaded = read_weights_file(save(state, tmp_path / "x"))
    assert set(loaded) - set(read_weights_file(save(TREE, tmp_path / "y"))) == {
        "ema_params.fc.bias"
    }


def test_types_that_numpy_lacks_and_large_arrays_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    tree = {"params": {"fc": {"bias": jnp.arange(9, dtype=jnp.bfloat16)}}}
    loaded = read_weights_file(save(tree, tmp_path / "x"))["fc.bias"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.astype(np.float32), np.arange(9))


def array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def chunked(**content):
    return {"__msgpack_chunked_array__": True, **content}


BAD = {
    "cut": serialization.to_bytes(TREE)[:-1],
    "deep": b"\x81\xa1a" * 100_000,
    "long": b"\x81\xa1a" + b"\xdd\x7f\xff\xff\xff" * 500,
    "huge": msgpack.packb({"a": array((1 << 40,), "float32", b"")}),
    "objects": msgpack.packb({"a": array((1,), "O", bytes(8))}),
    "wide": msgpack.packb({"a": array((1,), "V1000000000", bytes(8))}),
    "other code": b"\x81\xa1a\xc7\x03\x01abc",
    "no chunks": msgpack.packb({"a": chunked(shape={"0": 5})}),
    "chunks": msgpack.packb({"a": chunked(shape={"0": 5}, chunks={"0": 1})}),
    "twice": serialization.to_bytes(
        {"params": TREE["params"], "x": 1, "batch_stats": TREE["params"]}
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_one_error(case, tmp_path):
    (tmp_path / "x").write_bytes(BAD[case])
    with pytest.raises(ValueError, match="x cannot be read as weights"):
        read_weights_file(tmp_path / "x")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A tree of orbax, of one array: others would be read on after an error."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            tmp_path / "x" / "default", {"batch_stats": TREE["batch_stats"]}
        )
    return tmp_path / "x"


def damage(folder, case):
    tree = folder / "default"
    about = tree / "batch_stats.bn1.mean" / ".zarray"
    if case == "huge":
        content = json.loads(about.read_text()) | {"shape": [1 << 40]}
        about.write_text(json.dumps(content | {"chunks": [1 << 40]}))
    elif case == "cut":
        about.with_name("0").write_bytes(b"junk")
    elif case == "missing":
        about.unlink()
    elif case == "odd":
        (tree / "_METADATA").write_text("{}")
    elif case == "deep":
        (tree / "_METADATA").write_text("[" * 100_000)
    elif case == "pipe":
        about.unlink()
        os.mkfifo(about)
    elif case == "several":
        (folder / "2").mkdir()
        (folder / "2" / "_METADATA").write_text("{}")
    elif case == "none":
        (tree / "_METADATA").unlink()


CASES = {
    "huge": "declares 8796093022",
    "cut": "",
    "missing": "",
    "odd": "tree_metadata",
    "deep": "recursion",
    "pipe": ".zarray is no file",
    "several": "name one of 2, default",
    "none": "not one that orbax has written",
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_folders_are_one_error(case, folder):
    assert "bn1.running_mean" in read_weights_file(folder)
    damage(folder, case)
    with pytest.raises(ValueError, match=f"x cannot be read.*{CASES[case]}"):
        read_weights_file(folder)


def test_safetensors_of_any_type_are_read(tmp_path):
    kinds = {"F8_E5M2": 1, "BF16": 2, "F64": 8, "C64": 8}
    content, end = {}, 0
    for kind, size in kinds.items():
        place = {"shape": [2], "data_offsets": [end, end + 2 * size]}
        content[kind] = {"dtype": kind, **place}
        end += 2 * size
    header = json.dumps(content).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(end)
    (tmp_path / "x").write_bytes(data)
    loaded = read_weights_file(tmp_path / "x")
    assert repr(loaded.pop("C64")) == "<a tensor of C64>"
    types = {kind: loaded[kind].dtype.name for kind in loaded}
    assert types == {"F8_E5M2": "float8_e5m2", "BF16": "bfloat16", "F64": "float64"}


def test_weights_without_an_order_are_sorted(tmp_path):
    """Any order but that of names is taken for the network's by `match_torch`."""
    names = {f"{letter}{i}": np.zeros(1) for i in range(9) for letter in "ba"}
    for i in range(2):
        part = {f"{letter}{i}": np.zeros(1) for letter in "ba"}
        save_file(part, tmp_path / f"part{1 - i}")
    save_file(names, tmp_path / "whole")
    assert [*read_weights_file(tmp_path / "whole")] == sorted(names)
    places = {"a": "part0", "b": "part1"}
    (tmp_path / "x.json").write_text(json.dumps({"weight_map": places}))
    assert [*read_weights_file(tmp_path / "x.json")] == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../x"}, "'../x' is no file of weights beside it"),
        ({"a": "x.json"}, "'x.json' is no file of weights beside it"),
        ({"a": 3}, "x.json cannot be read"),
        ([1], "x.json cannot be read"),
        ({"a": "gone.bin"}, "gone.bin"),
        ({"a": "x" * 2000}, "there is no weights file"),
    ],
)
def test_an_index_names_files_beside_it(places, message, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_weights_file(tmp_path / "x.json")
