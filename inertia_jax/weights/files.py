"""Opens a file of weights by what it holds, whatever it is called.

PyTorch's files, of both formats, need no PyTorch: `pickles.py` reads them, and runs
nothing of what they name.
"""

import contextlib
import io
import json
import mmap
import os
import pathlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

import numpy as np
from safetensors import SafetensorError

from inertia_jax.atomic import local_path
from inertia_jax.weights.flax_files import is_msgpack, read_msgpack, read_orbax
from inertia_jax.weights.pickles import Unknown, as_key, is_text, read_pickle
from inertia_jax.weights.rebuild import TABLE, Storage, storage_dtype
from inertia_jax.weights.safetensors_files import read_safetensors

# The first pickle of PyTorch's format before version 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# An index has a line for each weight.
_MAX_INDEX_BYTES = 1 << 26
# What bytes that are damaged, or made by hand, lead to.
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError),
    *(MemoryError, ValueError, struct.error, zipfile.BadZipFile, SafetensorError),
)


class _Map(mmap.mmap):
    """A file of which no more is read than there is, whatever is asked for.

    A file of Python's takes memory for all bytes that it is asked for.
    """

    def seekable(self) -> bool:
        """Python knows this of a map from version 3.13 on."""
        return True


def read_weights(
    weights: str | pathlib.Path | Mapping[str, Any],
) -> tuple[Mapping[str, Any], pathlib.Path | None]:
    """Returns what a file holds, and its path; what is no path is returned, and None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, or damaged.
    """
    if isinstance(weights, Mapping):
        return weights, None
    path = local_path(weights).expanduser()
    loaded = read_weights_file(path)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; must be a dict.")
    return loaded, path


@contextlib.contextmanager
def naming(path: pathlib.Path | None) -> Iterator[None]:
    """Names the file, where there is one, in the errors of what it holds."""
    try:
        yield
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {error}") from error


def read_weights_file(path: pathlib.Path) -> Any:
    """Returns what a file holds: a mapping of arrays, which others may nest.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, or damaged.
    """
    # These functions of `os.path`, unlike pathlib's, take names that are too long.
    is_folder = os.path.isdir(path)
    if not is_folder and not os.path.isfile(path):
        raise FileNotFoundError(f"there is no weights file at {path!s:.1000}.")
    head = b""
    try:
        if is_folder:
            return read_orbax(path)
        with path.open("rb") as file:
            head = file.read(512)
            if head[8:9] == b"{":
                return read_safetensors(path)
            if is_msgpack(head):
                return read_msgpack(path.read_bytes())
            if head.lstrip()[:1] == b"{":
                return _read_shards(path)
            if not head:
                raise ValueError("it is empty")
            if head.startswith((b"PK\x03\x04", b"\x80")):
                read = _read_legacy if head[0] == 0x80 else _read_zip
                with _Map(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    return read(content)
    except _DAMAGE as error:
        reason = f"{error!s:.200}".rstrip(".") or type(error).__name__
        message = f"{path} cannot be read as weights: {reason}."
        raise ValueError(message) from error
    hint = ""
    if head[257:262] == b"ustar":
        hint = (
            " It is a tar file, as PyTorch wrote at first: save it again with PyTorch."
        )
    raise ValueError(
        f"{path} holds no weights: no file of torch.save, safetensors or Flax. It "
        f"begins with {head[:32]!r}.{hint}"
    )


def _read_shards(index: pathlib.Path) -> dict[str, Any]:
    """Reads the files that an index such as `model.safetensors.index.json` names."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"its JSON is longer than {_MAX_INDEX_BYTES} bytes")
    names = set(json.loads(index.read_bytes())["weight_map"].values())
    weights: dict[str, Any] = {}
    for name in sorted(names):
        shard = index.parent / name
        # A name with folders in it would reach anywhere, an index itself for ever.
        if shard.name != name or shard.suffix == ".json":
            raise ValueError(f"{name!r:.100} is no file of weights beside it")
        loaded = read_weights_file(shard)
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{name} holds a {type(loaded).__name__}; must be a dict")
        weights |= loaded
    # Several files in a row would look like an order of the network.
    return dict(sorted(weights.items()))


def _typed(saved: Any) -> tuple[np.dtype | None, Any, int]:
    """Returns the type, the key and the number of bytes of a storage.

    Raises:
        ValueError: What is saved is no storage.
    """
    is_tuple = isinstance(saved, tuple) and len(saved) >= 5
    if not is_tuple or not is_text(saved[0], "storage"):
        raise ValueError("an object outside of the pickle is no storage")
    _, kind, key, _location, num_elements = saved[:5]
    if type(as_key(key)) not in (int, str):
        raise ValueError("a storage has no name")
    if type(num_elements) is not int or num_elements < 0:
        raise ValueError(f"the storage {key} has no number of elements")
    dtype = storage_dtype(kind)
    return dtype, key, num_elements * (dtype.itemsize if dtype else 0)


def _read_zip(file: _Map) -> Any:
    # A map is not declared to be a file.
    binary = cast(IO[bytes], file)
    if not zipfile.is_zipfile(binary):
        raise ValueError("its end is missing, as where a download was cut off")
    with zipfile.ZipFile(binary) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        for info in entries.values():
            if info.CRC == 0:
                # PyTorch was told to write no checksums, and Python then checks none.
                del info.CRC
        stored = {
            name: info.file_size
            for name, info in entries.items()
            if info.compress_type == zipfile.ZIP_STORED
        }
        if sum(stored.values()) > len(file):
            raise ValueError("its entries are longer than the file")

        def read(name: str) -> bytes:
            if name not in entries:
                raise ValueError(f"it lacks {name}")
            if name not in stored:
                raise ValueError(f"{name} is compressed, as PyTorch does not do")
            return archive.read(name)

        pickles = [name for name in entries if f"/{name}".endswith("/data.pkl")]
        if not pickles:
            raise ValueError("it is a zip file, but not one of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        swapped = order in entries and read(order) == b"big"
        storages: dict[str, bytes] = {}

        def persistent(saved: Any) -> Any:
            dtype, key, num_bytes = _typed(saved)
            if dtype is None:
                return Unknown("a storage")
            name = f"{root}data/{key}"
            if name not in storages:
                storages[name] = read(name)
                if swapped:
                    # NumPy knows the parts of complex numbers.
                    word = dtype if dtype.kind == "c" else f"u{dtype.itemsize}"
                    words = np.frombuffer(storages[name], word)
                    storages[name] = words.byteswap().tobytes()
            if len(storages[name]) != num_bytes:
                raise ValueError(
                    f"{name} has {len(storages[name])} bytes; must have {num_bytes}"
                )
            return Storage(storages[name], dtype)

        data = read(pickles[0])
        return read_pickle(
            io.BytesIO(data), len(data), known=TABLE, persistent=persistent
        )


def _read_legacy(file: _Map) -> Any:
    storages: dict[Any, tuple[bytearray, int]] = {}
    free = len(file)

    def persistent(saved: Any) -> Any:
        nonlocal free
        if isinstance(saved, tuple) and saved and is_text(saved[0], "module"):
            return saved[1]  # a class, which older files store with its source
        dtype, key, num_bytes = _typed(saved)
        if dtype is None:
            return Unknown("a storage")
        if key not in storages:
            free -= num_bytes
            if free < 0:
                raise ValueError("its storages are longer than the file")
            # Filled when all tensors are made: the bytes follow the pickle.
            storages[key] = (bytearray(num_bytes), dtype.itemsize)
        data = memoryview(storages[key][0])
        if len(saved) > 5 and saved[5] is not None:
            _, first, length = saved[5]
            if type(first) is not int or type(length) is not int:
                raise ValueError(f"a part of the storage {key} has no bounds")
            data = data[first * dtype.itemsize :][: length * dtype.itemsize]
        return Storage(data, dtype)

    def read() -> Any:
        return read_pickle(file, len(file), known=TABLE, persistent=persistent)

    magic = read()
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one of torch.save")
    read()  # the version of the format
    if read().get("little_endian") is False:
        raise ValueError("it was saved on a machine of another byte order")
    loaded, keys = read(), read()
    for key in keys:
        if as_key(key) not in storages:
            raise ValueError("it has a storage of no tensor, or of a type without size")
        data, itemsize = storages.pop(key)
        (length,) = struct.unpack("<q", file.read(8))
        bytes_there = file.read(len(data))
        if not length * itemsize == len(data) == len(bytes_there):
            raise ValueError(f"the storage {key} has not the length that it must have")
        data[:] = bytes_there
    if storages:
        raise ValueError(f"it lacks the bytes of the storage {next(iter(storages))}")
    return loaded
