"""Files as torch.save writes them, made of opcodes and without PyTorch."""

import pickle
import struct
import zipfile

import numpy as np

# Opcodes of pickles such as torch.save's.


def push(value):
    return pickle.dumps(value, 2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(key, num_elements, kind="FloatStorage"):
    parts = push("storage"), name("torch", kind), push(key), push("cuda:0")
    return b"(" + b"".join(parts) + push(num_elements) + b"tQ"


def tensor(stored, size, stride, offset=0, function="_rebuild_tensor_v2", more=b""):
    hooks = call(name("collections", "OrderedDict"))
    numbers = push(offset) + push(size) + push(stride) + push(False)
    return call(name("torch._utils", function), stored, numbers, hooks, more)


def dictionary(**items):
    pairs = b"".join(push(key) + value for key, value in items.items())
    return b"\x80\x02}(" + pairs + b"u."


NUMBERS = np.arange(6, dtype=np.float32)


def write_zip(path, data, storages=None, **more):
    """Writes a file of torch.save's format without PyTorch."""
    storages = {"0": NUMBERS.tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", **more) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def legacy(data, keys=("0",), storages=None, *, little_endian=True):
    system = {"little_endian": little_endian}
    heads = (0x1950A86A20F9469CFC6C, 1001, system)
    content = b"".join(pickle.dumps(head, 2) for head in heads)
    content += data + pickle.dumps(list(keys), 2)
    storages = [NUMBERS.tobytes()] if storages is None else storages
    for stored in storages:
        content += struct.pack("<q", len(stored) // 4) + stored
    return content


def old_storage(key, num_elements, view=None, kind="FloatStorage"):
    return storage(key, num_elements, kind)[:-2] + push(view) + b"tQ"
