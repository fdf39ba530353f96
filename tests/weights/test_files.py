"""Files of weights are read by what they hold, with PyTorch and without."""

import argparse
import collections
import contextlib
import io
import pathlib
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from saved_weights import (
    NUMBERS,
    call,
    dictionary,
    legacy,
    name,
    old_storage,
    push,
    storage,
    tensor,
    write_zip,
)

from inertia_jax.weights.files import read_weights_file
from inertia_jax.weights.pickles import Unknown


def test_a_zip_file_is_read_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    views = {
        "rows": tensor(storage("0", 6), (2, 3), (3, 1)),
        "columns": tensor(storage("0", 6), (3, 2), (1, 3)),
        "end": tensor(storage("0", 6), (2,), (1,), offset=4),
        "one": tensor(storage("0", 6), (5,), (0,), offset=3),
        "scalar": tensor(storage("0", 6), (), (), offset=5),
        "none": tensor(storage("0", 6), (0, 3), (3, 1)),
    }
    loaded = read_weights_file(write_zip(tmp_path / "x.bin", dictionary(**views)))
    rows = NUMBERS.reshape(2, 3)
    expected = {"rows": rows, "columns": rows.T, "end": [4, 5], "one": 5 * [3]}
    expected |= {"scalar": 5, "none": np.zeros((0, 3))}
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert loaded[key].dtype == np.float32
        np.testing.assert_array_equal(loaded[key], value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("Double", "f8"), ("Half", "f2"), ("BFloat16", ml_dtypes.bfloat16)),
        *(("Long", "i8"), ("Char", "i1"), ("Bool", "?"), ("ComplexFloat", "c8")),
    ],
)
@pytest.mark.parametrize("order", ["little", "big"])
def test_types_and_byte_orders_are_kept(kind, dtype, order, tmp_path):
    values = np.arange(6).astype(dtype)
    word = values.dtype if values.dtype.kind == "c" else f"u{values.itemsize}"
    words = values.view(word)
    stored = words.byteswap() if order == "big" else words
    data = dictionary(x=tensor(storage("0", 6, f"{kind}Storage"), (6,), (1,)))
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/byteorder", order)
        archive.writestr("a/data/0", stored.tobytes())
    loaded = read_weights_file(path)["x"]
    assert loaded.dtype == values.dtype
    np.testing.assert_array_equal(loaded, values)


BAD_TENSORS = {
    "too long": tensor(storage("0", 6), (7,), (1,)),
    "beyond": tensor(storage("0", 6), (2,), (1,), offset=5),
    "far": tensor(storage("0", 6), (2,), (1 << 62,)),
    "around 64 bits": tensor(storage("0", 6), (5,), (1 << 60,)),
    "a sum around 64 bits": tensor(storage("0", 6), (3, 3), (1 << 60, 1 << 60)),
    "negative stride": tensor(storage("0", 6), (2,), (-1,), offset=5),
    "negative size": tensor(storage("0", 6), (-2,), (1,)),
    "negative offset": tensor(storage("0", 6), (2,), (1,), offset=-1),
    "huge": tensor(storage("0", 6), (1 << 62, 4), (0, 0)),
    "other lengths": tensor(storage("0", 6), (2, 3), (1,)),
    "axes": tensor(storage("0", 6), (1,) * 100, (0,) * 100),
    "storage too short": tensor(storage("0", 1 << 40), (2,), (1,)),
    "storage too long": tensor(storage("0", 5), (2,), (1,)),
    "negative storage": tensor(storage("0", -1), (2,), (1,)),
    "no storage": tensor(storage("9", 6), (2,), (1,)),
    "outside": tensor(storage("../byteorder\x00", 6), (2,), (1,)),
    "key": tensor(storage(("0",), 6), (2,), (1,)),
    "foreign object": b"(" + push("module") + b"tQ",
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_lie_in_their_bytes_are_an_error(case, tmp_path):
    path = write_zip(tmp_path / "x.pth", dictionary(x=BAD_TENSORS[case]))
    with pytest.raises(ValueError, match="x.pth cannot be read as weights"):
        read_weights_file(path)


# Pairs, as many as the tensor says, and a tuple whose text is that long.
ROWS = tensor(storage("0", 6), (1 << 20, 2), (0, 0))
DOUBLED = b"(t" + 17 * b"2\x86"


def places(value):
    """Returns pickles that have a value where none of its kind belongs."""
    hooks, stored = call(name("collections", "OrderedDict")), storage("0", 6)
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    rebuild_any = name("torch._tensor", "_rebuild_from_type_v2")
    dtype = call(name("numpy", "dtype"), push("f4"))
    frombuffer = name("numpy.core.numeric", "_frombuffer")
    one, data, none = push((1,)), push(b"abcd"), push(None)
    end = push(False) + hooks

    def saved(**parts):
        default = {"tag": push("storage"), "kind": name("torch", "FloatStorage")}
        default |= {"key": push("0"), "place": push("cpu"), "number": push(6)}
        return b"(" + b"".join((default | parts).values()) + b"tQ"

    return {
        "bytes of a tensor": call(rebuild, value, push(0), one, one, end),
        "offset": call(rebuild, stored, value, one, one, end),
        "size": call(rebuild, stored, push(0), value, one, end),
        "stride": call(rebuild, stored, push(0), one, value, end),
        "type": tensor(stored, (1,), (1,), function="_rebuild_tensor_v3", more=value),
        "function": call(rebuild_any, value, none, push(()), none),
        "arguments": call(rebuild_any, rebuild, none, value, none),
        "elements": call(name("torch", "Size"), value),
        "pairs": call(name("collections", "OrderedDict"), value),
        "byte order": dtype + b"(" + push(3) + value + none + b"tb",
        "name of a type": call(name("numpy", "dtype"), value),
        "bytes": call(frombuffer, value, dtype, one, push("C")),
        "shape": call(frombuffer, data, dtype, value, push("C")),
        "order": call(frombuffer, data, dtype, one, value),
        "text": call(name("_codecs", "encode"), value, push("latin1")),
        "encoding": call(name("_codecs", "encode"), push("x"), value),
        "module": value + push("x") + b"\x93",
        **{part: saved(**{part: value}) for part in ("tag", "kind", "key", "number")},
    }


@pytest.mark.parametrize("place", places(b""))
@pytest.mark.parametrize("value", [ROWS, DOUBLED], ids=["rows", "doubled"])
def test_no_object_is_unfolded_where_none_belongs(place, value, tmp_path):
    path = write_zip(tmp_path / "x.pth", dictionary(x=places(value)[place]))
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            loaded = read_weights_file(path)["x"]
            assert not isinstance(loaded, Unknown) or len(repr(loaded)) < 200
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_a_function_that_copies_is_not_called_by_another(tmp_path):
    pairs = call(name("torch._tensor", "_rebuild_from_type_v2"))[:-2]
    pairs += name("collections", "OrderedDict") + push(None) + push(([],)) + push({})
    loaded = read_weights_file(write_zip(tmp_path / "x", dictionary(x=pairs + b"tR")))
    assert repr(loaded["x"]) == "<a tensor of collections.OrderedDict>"


@pytest.mark.parametrize("state", [b"N", push("")])
def test_arrays_without_bytes_take_no_memory(state, tmp_path):
    dtype = call(name("numpy", "dtype"), push("f4"))
    made = call(name("numpy.core.multiarray", "_reconstruct"))
    made += b"(" + push(1) + push((10,)) + dtype + push(False) + state + b"tb"
    path = write_zip(tmp_path / "x.pth", dictionary(x=made))
    with pytest.raises(ValueError, match="x.pth cannot be read as weights"):
        read_weights_file(path)


def test_an_error_is_no_longer_than_a_few_lines(tmp_path):
    missing = tensor(storage("k" * 100_000, 6), (1,), (1,))
    path = write_zip(tmp_path / "x.pth", dictionary(x=missing))
    with pytest.raises(ValueError, match="it lacks archive/data/kkk") as error:
        read_weights_file(path)
    assert len(str(error.value)) < 300 + len(str(path))


def test_a_huge_view_of_one_number_takes_no_memory(tmp_path):
    huge = tensor(storage("0", 6), (1 << 20, 1 << 20), (0, 0))
    path = write_zip(tmp_path / "x.pth", dictionary(x=huge))
    tracemalloc.start()
    try:
        assert read_weights_file(path)["x"].shape == (1 << 20, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_has_no_numbers_is_a_name(tmp_path):
    hooks = call(name("collections", "OrderedDict"))
    stored = storage("0", 6)
    tensors = {
        "sparse": call(name("torch._utils", "_rebuild_sparse_tensor"), push(1)),
        "quantised": call(name("torch._utils", "_rebuild_qtensor"), stored),
        "meta": call(name("torch._utils", "_rebuild_meta_tensor_no_storage"), push(1)),
        "conjugate": tensor(stored, (6,), (1,), more=push({"conj": True})),
        "foreign": tensor(storage("0", 6, "NewStorage"), (6,), (1,)),
        "numpy": call(name("numpy.core.multiarray", "scalar"), name("os", "x"), hooks),
    }
    loaded = read_weights_file(write_zip(tmp_path / "x.pth", dictionary(**tensors)))
    assert all(isinstance(value, Unknown) for value in loaded.values())
    assert "sparse" in repr(loaded["sparse"])


def test_weights_are_read_beside_what_would_run(tmp_path):
    made = tmp_path / "made"
    weight = tensor(storage("0", 6), (6,), (1,))
    evil = call(name("os", "system"), push(f"touch {made}"))
    path = write_zip(tmp_path / "x.pth", dictionary(weight=weight, evil=evil))
    loaded = read_weights_file(path)
    np.testing.assert_array_equal(loaded["weight"], NUMBERS)
    assert repr(loaded["evil"]) == "<os.system>"
    assert not made.exists()


def test_compressed_zip_files_are_an_error(tmp_path):
    path = tmp_path / "x.pth"
    write_zip(path, dictionary(), {"0": bytes(1 << 20)}, compression=8)
    with pytest.raises(ValueError, match="compressed"):
        read_weights_file(path)


def test_files_without_checksums_are_read_and_wrong_ones_are_an_error(tmp_path):
    path = write_zip(
        tmp_path / "x.pth", dictionary(x=tensor(storage("0", 6), (6,), (1,)))
    )
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        sums = {i.filename: struct.pack("<L", i.CRC) for i in archive.infolist()}
    path.write_bytes(content.replace(sums["archive/data/0"], b"abcd"))
    with pytest.raises(ValueError, match="CRC-32 for file 'archive/data/0'"):
        read_weights_file(path)
    for checksum in sums.values():
        content = content.replace(checksum, bytes(4))
    path.write_bytes(content)
    np.testing.assert_array_equal(read_weights_file(path)["x"], NUMBERS)


def test_what_pytorch_writes_without_checksums_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.from_numpy(NUMBERS)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    loaded = read_weights_file(tmp_path / "x.pth")
    np.testing.assert_array_equal(loaded["x"], NUMBERS)


def test_the_format_before_zip_is_read_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    path = tmp_path / "x.th"
    views = {
        "rows": tensor(old_storage("0", 6), (2, 3), (3, 1)),
        "view": tensor(old_storage("0", 6, ("1", 2, 3)), (3,), (1,)),
    }
    path.write_bytes(legacy(dictionary(**views)))
    loaded = read_weights_file(path)
    np.testing.assert_array_equal(loaded["rows"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(loaded["view"], [2, 3, 4])
    # Python 2's pairs are an argument.
    pairs = b"(((" + push("rows") + views["rows"] + b"lltR."
    path.write_bytes(legacy(b"\x80\x02" + name("collections", "OrderedDict") + pairs))
    np.testing.assert_array_equal(read_weights_file(path)["rows"][1], [3, 4, 5])


def test_storages_of_a_known_size_are_skipped(tmp_path):
    kinds = {"1": "ComplexHalfStorage", "0": "FloatStorage"}
    tensors = {
        f"x{key}": tensor(old_storage(key, 6, kind=kind), (6,), (1,))
        for key, kind in kinds.items()
    }
    content = legacy(dictionary(**tensors), kinds, [bytes(24), NUMBERS.tobytes()])
    path = tmp_path / "x.th"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_weights_file(path)["x0"], NUMBERS)
    path.write_bytes(content.replace(b"ComplexHalf", b"New"))
    with pytest.raises(ValueError, match="a type without size"):
        read_weights_file(path)


OLD_ROWS = tensor(old_storage("0", 6), (1 << 20, 2), (0, 0))
PART = b"(" + push("1") + OLD_ROWS + push(3) + b"ttQ"
WHOLE = tensor(old_storage("0", 6), (2, 3), (3, 1))
BAD_LEGACY = {
    "huge": legacy(dictionary(x=tensor(old_storage("0", 1 << 50), (1,), (1,)))),
    "cut": legacy(dictionary(x=WHOLE))[:-1],
    "lacking": legacy(dictionary(x=WHOLE), storages=[]),
    "other length": legacy(dictionary(x=WHOLE), storages=[bytes(20)]),
    "unknown key": legacy(dictionary(x=WHOLE), keys=("1",)),
    "view": legacy(dictionary(x=tensor(old_storage("0", 6, ("1", 4, 9)), (3,), (1,)))),
    "bounds": legacy(dictionary(x=tensor(storage("0", 6)[:-2] + PART, (3,), (1,)))),
    "magic": b"\x80\x02" + OLD_ROWS + b".",
    "no key": legacy(dictionary(x=WHOLE), keys=(), storages=[]),
    "twice": legacy(dictionary(x=WHOLE), ("0", "0"), 2 * [NUMBERS.tobytes()]),
    "big endian": legacy(dictionary(x=WHOLE), little_endian=False),
    "no pickle": legacy(b"\x80\x02X")[:60],
    "plain pickle": pickle.dumps({"x": [1.0]}, 2),
    "a number": pickle.dumps(1, 2),
}


@pytest.mark.parametrize("case", BAD_LEGACY)
def test_damaged_files_before_zip_are_an_error(case, tmp_path):
    path = tmp_path / "x.th"
    path.write_bytes(BAD_LEGACY[case])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="x.th cannot be read as weights"):
            read_weights_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_suffix_says_nothing(tmp_path):
    expected = {"x": NUMBERS}
    write_zip(tmp_path / "source", dictionary(x=tensor(storage("0", 6), (6,), (1,))))
    save_file(expected, tmp_path / "tensors")
    for source in ("source", "tensors"):
        for suffix in ("th", "pth.tar", "bin", "ckpt", "PTH", "safetensors"):
            path = tmp_path / f"{source}.{suffix}"
            path.write_bytes((tmp_path / source).read_bytes())
            np.testing.assert_array_equal(read_weights_file(path)["x"], NUMBERS)


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html>", "<!DOCTYPE html>"),
        (b"version https://git-lfs", "git-lfs"),
        (tar_bytes(), "save it again"),
        (b"PK\x03\x04" + bytes(99), "its end is missing"),
        (struct.pack("<q", 99) + b"{broken", "cannot be read as weights"),
    ],
)
def test_other_files_are_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pth") as error:
        read_weights_file(path)
    assert message in str(error.value)


def test_places_without_a_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        read_weights_file(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="it is a folder, but not one that orbax"):
        read_weights_file(tmp_path)
    np.savez(tmp_path / "x.npz", x=NUMBERS)
    with pytest.raises(ValueError, match="zip file, but not one of torch.save"):
        read_weights_file(tmp_path / "x.npz")


# What PyTorch itself writes.


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_pytorch_writes_is_read(protocol, is_zip, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    x = torch.arange(12.0).reshape(3, 4)
    tagged = torch.nn.Parameter(x.clone())
    tagged.tag = "attributes are pickled beside"
    tensors = {
        **{"plain": x, "transposed": x.t(), "slice": x[1:, 2:], "empty": x[:0]},
        **{"expanded": x[:1, :1].expand(5, 7), "parameter": torch.nn.Parameter(x)},
        **{"tagged": tagged, "scalar": x.sum(), "half": x.half(), "int": x.int()},
        **{"bool": x > 3, "complex": x.to(torch.complex64)},
    }
    new = {"bfloat16": torch.bfloat16}
    if is_zip:
        new |= {"float8_e4m3fn": torch.float8_e4m3fn, "uint16": torch.uint16}
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "path": pathlib.Path("a/b"),
        "best": np.float64(91.7),
        "epoch": np.int64(3),
        "curve": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "narrow": np.arange(3).astype(ml_dtypes.bfloat16),
        "objects": np.array([{}, None]),
        "counts": collections.Counter("aab"),
        "sparse": x.to_sparse(),
        "meta": x.to("meta"),
        "conjugate": x.to(torch.complex64).conj(),
        "types": [torch.float32, torch.device("cpu"), x.shape],
        "raw": b"\x00\xff",
    }
    path = tmp_path / "x.pth"
    content = tensors | {key: x.to(dtype) for key, dtype in new.items()} | beside
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save(content, path, **options)
    loaded = read_weights_file(path)
    for key, value in tensors.items():
        np.testing.assert_array_equal(loaded[key], value.numpy(force=True), key)
    for key in new:
        assert loaded[key].dtype.name == key
        np.testing.assert_array_equal(loaded[key].astype(np.float32), x.numpy())
    assert loaded["best"] == 91.7
    assert loaded["raw"] == b"\x00\xff"
    for key in ("curve", "big", "narrow"):
        found = getattr(loaded[key], "array", loaded[key])
        assert found.dtype == beside[key].dtype
        np.testing.assert_array_equal(found, beside[key])
    for key in ("args", "path", "counts", "sparse", "meta", "conjugate"):
        assert isinstance(loaded[key], Unknown), key


@pytest.mark.parametrize("case", ["zip", "legacy"])
def test_any_damage_is_read_or_an_error(case, tmp_path):
    path = tmp_path / "x.pth"
    if case == "zip":
        write_zip(path, dictionary(x=tensor(storage("0", 6), (2, 3), (3, 1))))
    else:
        path.write_bytes(legacy(dictionary(x=WHOLE)))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(150):
            content = np.frombuffer(whole, np.uint8).copy()
            places = rng.integers(len(content), size=rng.integers(1, 4))
            content[places] = rng.integers(256, size=len(places))
            stop = len(content) if rng.random() < 0.8 else rng.integers(len(content))
            path.write_bytes(content[:stop].tobytes())
            try:
                read_weights_file(path)
            except ValueError as error:
                assert "x.pth" in str(error)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
