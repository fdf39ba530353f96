"""The formats of exported networks, and how each is written and run."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import export

from inertia_jax import load_exported, save_exported
from inertia_jax.ops.conv.replaced import in_one_form
from inertia_jax.ops.inertial.settings import near_miss
from train.errors import UsageError
from train.export.comparison import Logits
from train.export.settings import Format
from train.networks import TrainedNetwork

FORMATS: tuple[Format, ...] = get_args(Format)
# Formats of the file's name alone.
_SUFFIXES: dict[str, Format] = {
    ".ijx": "ijx",
    ".stablehlo": "stablehlo",
    ".onnx": "onnx",
    ".pt": "torch",
    ".pth": "torch",
    ".safetensors": "safetensors",
}
# Formats that are a folder, and the name of the weights in it.
WEIGHTS = {"torch": "model.pt", "safetensors": "model.safetensors"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        network: The checkpoint's network.
        path: The checkpoint.
        call: The network as it is exported, a function of variables and images.
        variables: The variables as they are exported.
        image_shape: The shape [h, w, c] of the images.
        image_dtype: The type of the images.
        batch_size: Images a call; None: any number.
        platforms: Platforms that the file runs on; formats of JAX alone have any.
    """

    network: TrainedNetwork
    path: pathlib.Path
    call: Callable[[Any, Any], Any]
    variables: Any
    image_shape: tuple[int, int, int]
    image_dtype: Literal["uint8", "float32"]
    batch_size: int | None
    platforms: tuple[str, ...]


def choose_format(format_: Format | None, out: pathlib.Path) -> Format:
    """Returns the format that is given, or that of the file's name, or `ijx`.

    Raises:
        UsageError: The two contradict each other, or none is given and the name has a
            suffix that stands for none.
    """
    named = _SUFFIXES.get(out.suffix.lower())
    if format_ is None:
        if out.suffix and named is None:
            raise UsageError(
                f"the suffix of `out` (={out}) must be {', '.join(_SUFFIXES)}, or "
                f"--format must be given.{near_miss(out.suffix.lower(), _SUFFIXES)}"
            )
        return named or "ijx"
    if named is not None and named != format_:
        raise UsageError(
            f"`format` (={format_}) must be {named} for `out` (={out}), or `out` must "
            f"have another suffix."
        )
    return format_


def place_of(format_: Format, out: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Returns the file or folder that appears, and the name of the weights in it.

    Raises:
        UsageError: A file of weights is not in a folder of its own.
    """
    if format_ not in WEIGHTS:
        return out, ""
    if _SUFFIXES.get(out.suffix.lower()) is None:
        return out, WEIGHTS[format_]
    if out.parent.exists():
        raise UsageError(
            f"`out` (={out}) must be in a new folder, which gets the files that belong "
            f"to it, e.g. {out.with_suffix('') / out.name}."
        )
    return out.parent, out.name


def write_ijx(path: pathlib.Path, job: Job) -> Logits | None:
    """Writes a file of `inertia_jax.save_exported`; its logits, if it runs here."""
    network = job.network
    save_exported(
        path,
        functools.partial(job.call, job.variables),
        image_shape=job.image_shape,
        image_dtype=job.image_dtype,
        batch_size=job.batch_size,
        platforms=job.platforms,
        class_names=network.class_names,
        info={"checkpoint": str(job.path), **dataclasses.asdict(network.metadata)},
    )
    backend = jax.default_backend()
    here = ("cuda", "rocm") if backend == "gpu" else (backend,)
    if not set(here) & set(job.platforms):
        return None
    exported = load_exported(path)
    return lambda images: np.asarray(exported(images))


def write_stablehlo(path: pathlib.Path, job: Job) -> Logits:
    """Writes a portable artifact of StableHLO: its bytecode, with the weights inside.

    The program is the same for every platform.

    Raises:
        ValueError: There is no batch size, or the program calls what only XLA has.
    """
    if job.batch_size is None:
        raise ValueError(
            "`batch_size` (=dynamic) must be a number for `format` (=stablehlo), since "
            "the compilers that read it know fixed shapes, e.g. --batch-size 1."
        )

    def network(images: Any) -> Any:
        return job.call(job.variables, images)

    shape = (job.batch_size, *job.image_shape)
    with in_one_form():
        exported = export.export(jax.jit(network), platforms=("cpu",))(
            jax.ShapeDtypeStruct(shape, job.image_dtype)
        )
    if "stablehlo.custom_call" in exported.mlir_module():
        raise ValueError(
            "`format` (=stablehlo) cannot hold this network: it calls what XLA has for "
            "this machine alone."
        )
    path.write_bytes(exported.mlir_module_serialized)
    read = dataclasses.replace(exported, mlir_module_serialized=path.read_bytes())
    # What is lowered for CPU is run there.
    cpu = jax.local_devices(backend="cpu")[0]
    return lambda images: np.asarray(read.call(jax.device_put(images, cpu)))
