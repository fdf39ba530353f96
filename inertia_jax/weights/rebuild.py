"""What the classes and functions that pickles of weights name are read as.

The table knows PyTorch's dense tensors and parameters, NumPy's arrays and scalars of
numbers, and Python's containers. All arrays are views of bytes that the file holds, so
that a tensor of a stride of 0 takes no memory until it is copied.
"""

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from inertia_jax.weights.pickles import Global, Unknown, as_key, brief, is_text

# PyTorch's types of storages, and of elements, as NumPy and ml_dtypes have them.
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "ComplexHalf": "V4",  # no numbers to NumPy, but of a size
    # Of quantised tensors, which are not read; their bytes may stand before others'.
    "QInt8": "int8",
    "QUInt8": "uint8",
    "QInt32": "int32",
    "QUInt4x2": "uint8",
    "QUInt2x4": "uint8",
}
_NUMBERS = re.compile(r"(bool|uint|int|float|bfloat)\d*(_e\dm\d\w*)?")


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of a file that tensors are views of.

    Attributes:
        data: The bytes.
        dtype: Type of the elements; uint8 for a storage without one.
    """

    data: Any
    dtype: np.dtype


def storage_dtype(name: Any) -> np.dtype | None:
    """Returns the type of a class of storages, or None of one that is not read."""
    if not isinstance(name, Global):
        return None
    short = re.fullmatch(r"torch\.(cuda\.|storage\.)?(\w+)Storage", name)
    if short is None:
        return None
    kind = "Byte" if short[2] == "Untyped" else short[2]
    return np.dtype(_dtype(_STORAGES[kind])) if kind in _STORAGES else None


def _dtype(name: str) -> Any:
    return getattr(ml_dtypes, name, None) or np.dtype(name)


def _torch_dtype(name: Any) -> np.dtype | None:
    if not isinstance(name, Global):
        return None
    short = name.removeprefix("torch.")
    if _NUMBERS.fullmatch(short):
        try:
            return np.dtype(_dtype(short))
        except TypeError:  # a type that NumPy and ml_dtypes lack
            return None
    return None


def _tuple(values: Any = ()) -> tuple[Any, ...]:
    # An array of a stride of 0 may have any number of rows.
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{brief(values)} must be a list or a tuple")
    return tuple(values)


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _requires_grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: np.dtype | None = None,
) -> Any:
    if not isinstance(storage, Storage):
        return Unknown("a tensor of numbers that are not read")
    if metadata:
        return Unknown("a tensor with a conjugate or negative bit")
    dtype = dtype or storage.dtype
    sizes, strides, step = _tuple(size), _tuple(stride), dtype.itemsize
    numbers = (offset, *sizes, *strides)
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("offsets, sizes and strides must be integers >= 0")
    # NumPy adds in 64 bits, and takes a sum that is too large for a small one.
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if 0 not in sizes and (last + 1) * step > len(storage.data):
        raise ValueError("a tensor goes beyond its storage")
    return np.ndarray(
        sizes, dtype, storage.data, offset * step, [s * step for s in strides]
    )


def _tensor_v3(*arguments: Any) -> Any:
    storage, offset, size, stride, requires_grad, hooks, dtype, *metadata = arguments
    known = _torch_dtype(dtype)
    if known is None:
        return Unknown(f"a tensor of {brief(dtype)}")
    return _tensor(
        storage, offset, size, stride, requires_grad, hooks, *metadata, dtype=known
    )


def _tensor_from_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    # Other functions copy what they are given, which only the reader counts.
    is_tensor = isinstance(function, Global) and function.startswith("torch._utils.")
    if is_tensor and function in TABLE:
        return TABLE[function](*_tuple(arguments))
    return Unknown(f"a tensor of {brief(function)}")


@dataclasses.dataclass
class NumPyType:
    """A type of numbers as NumPy pickles it: its byte order follows as state."""

    dtype: np.dtype

    def set_pickled(self, state: Any) -> None:
        """Takes the byte order, `state[1]`; `|` and `=` are the machine's."""
        if is_text(state[1], "<", ">") and self.dtype.isbuiltin == 1:
            self.dtype = self.dtype.newbyteorder(state[1])


@dataclasses.dataclass
class NumPyArray:
    """An array as NumPy pickles it: what it holds follows as state.

    Attributes:
        array: The array, or what stands for one of no numbers.
    """

    array: Any

    def set_pickled(self, state: Any) -> None:
        """Takes shape, type, order and bytes."""
        _, shape, kind, is_fortran, data = state
        # Python 2 has no bytes.
        data = data.encode("latin1") if isinstance(data, str) else data
        self.array = _frombuffer(data, kind, shape, "F" if is_fortran else "C")


def _numpy_type(name: Any, *_: Any) -> Any:
    if isinstance(name, Global) and name.startswith("ml_dtypes."):
        dtype = _torch_dtype(Global(name.removeprefix("ml_dtypes.")))
        return Unknown(f"a type {brief(name)}") if dtype is None else NumPyType(dtype)
    if isinstance(name, str) and re.fullmatch(r"[biufc]\d{1,2}", name):
        return NumPyType(np.dtype(name))
    return Unknown(f"a type {brief(name)}")


def _reconstruct(*_: Any) -> NumPyArray:
    return NumPyArray(Unknown("an array without numbers"))


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
    if not isinstance(kind, NumPyType):
        return Unknown("an array without numbers")
    # Without bytes, NumPy would take memory for any shape.
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError("an array has no bytes")
    order = "F" if is_text(order, "F") else "C"
    return np.ndarray(_tuple(shape), kind.dtype, data, order=order)


def _scalar(kind: Any, data: Any) -> Any:
    array = _frombuffer(data, kind, ())
    return array if isinstance(array, Unknown) else array[()]


def _ordered_dict(pairs: Any = ()) -> collections.OrderedDict[Any, Any]:
    # Python 2 writes the pairs as an argument.
    return collections.OrderedDict((as_key(key), value) for key, value in _tuple(pairs))


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    # How bytes are written in protocol 2.
    if not is_text(encoding, "latin1", "utf-8"):
        raise ValueError(f"{brief(encoding)} is no encoding of bytes in pickles")
    return text.encode(encoding)


def _sparse(*_: Any) -> Unknown:
    return Unknown("a sparse tensor")


def _quantised(*_: Any) -> Unknown:
    return Unknown("a quantised tensor")


def _meta(*_: Any) -> Unknown:
    return Unknown("a meta tensor, which has no numbers")


def _first(value: Any, *_: Any) -> Any:
    return value


_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray.scalar": _scalar,
    "multiarray._reconstruct": _reconstruct,
    "numeric._frombuffer": _frombuffer,
}
TABLE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "torch.Size": _tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._tensor._rebuild_from_type": _tensor_from_type,
    "torch._tensor._rebuild_from_type_v2": _tensor_from_type,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "numpy.dtype": _numpy_type,
    **{
        f"numpy.{core}.{name}": f
        for core in ("core", "_core")
        for name, f in _NUMPY.items()
    },
}
