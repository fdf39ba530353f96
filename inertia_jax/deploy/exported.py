"""Exported networks: one file that needs JAX alone to run.

A file is a zip archive of two members, stored without compression:

    network         the function with its weights, as `jax.export` serialises it
    metadata.json   shape and type of the images, class names, `info`

The archive's comment is the SHA-256 of all bytes before it. A file also runs without
this library:

    archive = zipfile.ZipFile(path)
    logits = jax.export.deserialize(archive.read("network")).call(images)

(`jax.export` needs the package flatbuffers to read it, as it does to write.)

Weights are constants of the function, not a second argument. So they cannot be mixed
up, and XLA arranges them when it compiles (ResNet18 at batch 1 on a CPU core: 12.1 ms
per call against 14.1, for 0.8 s of compilation against 0.5).
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, export
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from inertia_jax.atomic import appearing, local_path
from inertia_jax.json_values import check_class_names, jsonable

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_FORMAT = 1
_HASH_LENGTH = 64
# The flatbuffer that `jax.export` writes counts its bytes in 31 bits. Some of the bytes
# are not the program's.
_MOST_BYTES = 2**31 - 2**24


class ExportDamagedError(ValueError):
    """The error of a file that is no exported network, or was altered.

    Example:
        >>> import pathlib
        >>> pathlib.Path("empty.ijx").write_bytes(b"")
        0
        >>> try:
        ...     ij.load_exported("empty.ijx")
        ... except ij.ExportDamagedError:
        ...     print("no exported network")
        no exported network
    """


@dataclasses.dataclass(frozen=True)
class ExportedNetwork:
    """A network from a file, called on images.

    It is compiled anew for every new number of images.

    Attributes:
        input_shape: The shape [n, h, w, c] of the images; n is None where any number of
            images will do.
        input_dtype: The type of the images, e.g. `uint8`.
        class_names: A name for each class, or none at all.
        platforms: The platforms it runs on, some of `PLATFORMS`.
        info: Further facts from whoever wrote the file.
        function: The function from images to logits, for use inside other JAX
            functions; it has no derivative.

    Example:
        >>> ij.save_exported(
        ...     "mean.ijx", lambda x: x.mean((1, 2)), image_shape=(8, 8, 3)
        ... )
        >>> network = ij.load_exported("mean.ijx")
        >>> network.input_shape, network.platforms
        ((None, 8, 8, 3), ('cpu', 'cuda', 'tpu'))
    """

    input_shape: tuple[int | None, ...]
    input_dtype: np.dtype
    class_names: tuple[str, ...]
    platforms: tuple[str, ...]
    info: Mapping[str, Any]
    function: Callable[[Any], Array] = dataclasses.field(repr=False)

    def __call__(self, images: Shaped[ArrayLike, "n *image"]) -> Float[Array, "n *out"]:
        """Returns logits.

        Args:
            images: Raw or normalised pixels, whichever the file was made for.

        Raises:
            ValueError: Images of another shape or type, or a platform that the file was
                not made for.
        """
        images = images if isinstance(images, Array) else np.asarray(images)
        number = self.input_shape[0] or len(images)
        if number == 0 or images.shape != (number, *self.input_shape[1:]):
            shown = ("n >= 1" if s is None else str(s) for s in self.input_shape)
            raise ValueError(
                f"`images` (shape {images.shape}) must be [{', '.join(shown)}]."
            )
        if images.dtype != self.input_dtype:
            raise ValueError(
                f"`images` (type {images.dtype}) must be of type {self.input_dtype}."
            )
        return self.function(images)


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises ValueError unless `platforms` are some of `PLATFORMS`, each once."""
    known = set(platforms) <= set(PLATFORMS)
    if not platforms or not known or len(set(platforms)) < len(platforms):
        raise ValueError(
            f"`platforms` (={tuple(platforms)}) must be some of {', '.join(PLATFORMS)}."
        )


def save_exported(
    path: str | os.PathLike[str],
    function: Callable[[Any], Any] | tuple[Any, Mapping[str, Any]],
    *,
    image_shape: tuple[int, ...],
    image_dtype: Any = np.float32,
    batch_size: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    class_names: Sequence[str] = (),
    info: Mapping[str, Any] | None = None,
    apply_fn: Callable[[Any, Any, bool], Any] | None = None,
) -> None:
    """Writes a function of images to a file that needs JAX alone.

    None of the platforms need be present. The file appears at `path` whole or not at
    all. JAX promises that its versions of the next six months read it, so keep the
    checkpoint for longer times.

    Args:
        path: The file to make.
        function: A function from images [n, h, w, c] to logits, e.g. `lambda x:
            model.apply(variables, x)`. Arrays that it closes over go into the file. Or
            a pair (model, variables), which is called in evaluation mode.
        image_shape: The shape of one input, such as [h, w, c].
        image_dtype: The images' type.
        batch_size: Images per call. None: any number, a symbolic size.
        platforms: The platforms it shall run on, some of `PLATFORMS`.
        class_names: A name for each class.
        info: Further facts to store beside it, as JSON.
        apply_fn: How the model of a pair is called, as in `compress`.

    Raises:
        FileExistsError: Something exists at `path`.
        ValueError: An argument outside its range, a function whose shapes need a
            `batch_size`, as those of tiled inertial layers do, or weights of more than
            2 GB.
        OSError: The file could not be written; nothing of it is left.

    Example:
        >>> ij.save_exported("lenet.ijx", (model, variables), image_shape=(28, 28, 1))
        >>> ij.load_exported("lenet.ijx")(np.asarray(images)).shape
        (16, 10)

    References:
        https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
    """
    path = local_path(path)
    if path.exists():
        raise FileExistsError(f"`path` (={path}) must not exist; it was left as it is.")
    check_platforms(platforms)
    check_class_names(class_names)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be >= 1, or None.")
    if isinstance(image_shape, Mapping):
        raise ValueError(
            f"`image_shape` (={image_shape}) must be that of one array: networks of "
            f"several inputs cannot be exported."
        )
    if isinstance(function, tuple):
        one = jax.ShapeDtypeStruct((1, *image_shape), image_dtype)
        function = _evaluation(*function, one, apply_fn)
    elif apply_fn is not None:
        raise ValueError("`apply_fn` must be None beside a function of images alone.")
    number = export.symbolic_shape("n")[0] if batch_size is None else batch_size
    images = jax.ShapeDtypeStruct((number, *image_shape), image_dtype)
    try:
        exported = export.export(jax.jit(function), platforms=tuple(platforms))(images)
    except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
        # A symbolic size is no integer of Python, which `len` must return.
        if isinstance(error, TypeError) and "_DimExpr" not in str(error):
            raise
        raise ValueError(
            "`batch_size` (=None) must be a number for this function: some of its "
            "shapes depend on it, as the capacities of tiled inertial layers do, or it "
            "calls `len(images)`, for which `images.shape[0]` would do."
        ) from error
    size = len(exported.mlir_module_serialized)
    if size > _MOST_BYTES:
        raise ValueError(
            f"the function with its weights takes {size:,} bytes; must be at most "
            f"{_MOST_BYTES:,}."
        )
    metadata = {
        "format": _FORMAT,
        "jax": jax.__version__,
        "input_shape": (batch_size, *image_shape),
        "input_dtype": np.dtype(image_dtype).name,
        "class_names": tuple(class_names),
        "platforms": tuple(platforms),
        "info": dict(info or {}),
    }
    _write(path, bytes(exported.serialize()), metadata)


def _write(path: pathlib.Path, network: bytes, metadata: Mapping[str, Any]) -> None:
    """Writes an archive with its hash."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("network", network)
        text = json.dumps(metadata, indent=1, default=jsonable)
        archive.writestr("metadata.json", text)
        archive.comment = b"0" * _HASH_LENGTH
    with appearing(path) as partial, partial.open("wb") as stream:
        # The view is closed first: from Python 3.13 on it would outlive the buffer.
        with buffer.getbuffer() as whole, whole[:-_HASH_LENGTH] as content:
            stream.write(content)
            stream.write(hashlib.sha256(content).hexdigest().encode())


def _evaluation(
    model: Any, variables: Mapping[str, Any], one: jax.ShapeDtypeStruct, apply_fn: Any
) -> Callable[[Any], Any]:
    """Returns a network's evaluation as a function of images, tried on one."""
    # Whoever reads files needs JAX alone.
    from inertia_jax.calls import apply_network, one_array, own_errors
    from inertia_jax.variables import plain_variables

    variables = plain_variables(variables)

    def outputs(images: Any) -> Any:
        return apply_network(model, variables, images, apply_fn=apply_fn)[0]

    # With any number of images, JAX would not see that shapes do not suit each other.
    with own_errors(model, one):
        jax.eval_shape(outputs, one)
    return lambda images: one_array(outputs(images))


def load_exported(path: str | os.PathLike[str]) -> ExportedNetwork:
    """Checks a file against its SHA-256 and reads the exported network in it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no file at `path`.
        ExportDamagedError: It is no exported network, or has been altered.
        ValueError: This version of the library, or of JAX, cannot read it.

    Example:
        >>> ij.save_exported("sum.ijx", lambda x: x.sum((1, 2)), image_shape=(8, 8, 3))
        >>> ij.load_exported("sum.ijx")(np.ones((2, 8, 8, 3), "float32")).tolist()
        [[64.0, 64.0, 64.0], [64.0, 64.0, 64.0]]
    """
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no exported network at {path}.")
    content = path.read_bytes()
    found = hashlib.sha256(content[:-_HASH_LENGTH]).hexdigest().encode()
    if found != content[-_HASH_LENGTH:]:
        raise ExportDamagedError(
            f"{path} is no exported network, or damaged: its SHA-256 does not fit."
        )
    network, metadata = _read(path, content)
    if metadata["format"] != _FORMAT:
        raise ValueError(
            f"{path} has format {metadata['format']!r:.100}; must be {_FORMAT}."
        )
    try:
        exported = export.deserialize(bytearray(network))
    except ValueError as error:
        raise ValueError(
            f"{path} was written by jax {metadata['jax']:.100}, which jax "
            f"{jax.__version__} cannot read: {error!s:.500}"
        ) from error
    # The reader of flatbuffers checks nothing: an edited program raises anything.
    except Exception as error:
        reason = f"{error!r:.200}"
        raise ExportDamagedError(f"{path} has a broken program: {reason}.") from error
    shapes = [_numbers(given.shape) for given in exported.in_avals]
    types = [given.dtype.name for given in exported.in_avals]
    if (shapes, types) != ([metadata["input_shape"]], [metadata["input_dtype"]]):
        raise ExportDamagedError(
            f"{path} has a program for {shapes} of {types}, and says that its input is "
            f"{metadata['input_shape']!r:.200} of {metadata['input_dtype']:.200}."
        )
    return ExportedNetwork(
        input_shape=tuple(metadata["input_shape"]),
        input_dtype=exported.in_avals[0].dtype,
        class_names=tuple(metadata["class_names"]),
        platforms=tuple(metadata["platforms"]),
        info=metadata["info"],
        function=jax.jit(exported.call),
    )


def _read(path: pathlib.Path, content: bytes) -> tuple[bytes, dict[str, Any]]:
    """Returns a file's two members, the second of which has the fields of `_KINDS`.

    A hash is no signature: a file whose hash fits may have been edited by anyone.

    Raises:
        ExportDamagedError: The content is no such file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            # What is compressed may be of any size once it is read.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("its members must be stored without compression")
            if sum(member.file_size for member in members) > len(content):
                raise ValueError("its members must be no larger than the file")
            network = archive.read("network")
            metadata = json.loads(archive.read("metadata.json"))
        for name, is_of_kind in _KINDS.items():
            if not is_of_kind(metadata[name]):
                raise ValueError(f"`{name}` of its metadata is of another kind")
    except _BROKEN as error:
        reason = f"{error!s:.200}"
        raise ExportDamagedError(f"{path} is no exported network: {reason}.") from error
    return network, metadata


def _numbers(shape: tuple[Any, ...]) -> list[int | None]:
    """Returns a shape as the metadata have it: None is a symbolic size."""
    return [size if isinstance(size, int) else None for size in shape]


def _are(kinds: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda values: (
        isinstance(values, list) and all(isinstance(value, kinds) for value in values)
    )


# What must be so of the fields of `metadata.json`.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: isinstance(value, int),
    "jax": lambda value: isinstance(value, str),
    "input_shape": _are((int, type(None))),
    "input_dtype": lambda value: isinstance(value, str),
    "class_names": _are(str),
    "platforms": _are(str),
    "info": lambda value: isinstance(value, dict),
}
# Damaged and encrypted archives, unknown compressions, and JSON of another form.
_BROKEN = (
    *(zipfile.BadZipFile, EOFError, LookupError, NotImplementedError, OSError),
    *(RecursionError, RuntimeError, TypeError, ValueError),
)
