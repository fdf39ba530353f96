"""The options of `python -m train export`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from train.arguments import parse_options
from train.config import CheckpointArgument, FactoryOption
from train.export.settings import Format


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a checkpoint as a file that other programs run, or as a folder.

    ijx: one file that needs JAX alone. stablehlo: bytecode for IREE and other compilers
    of StableHLO. onnx: a file for ONNX Runtime and others. torch: a folder with a
    module of PyTorch and its state dict. safetensors: a folder of weights with the
    names of PyTorch. Each is compared with the checkpoint's logits, and is not kept if
    they differ.
    """

    checkpoint: CheckpointArgument
    """Checkpoint, or run, of which the best checkpoint is taken."""
    out: str
    """File or folder to write, which must not exist."""
    format: Format | None = None
    """Format; None: that of the suffix of `out` (.ijx, .stablehlo, .onnx, .pt, .pth,
    .safetensors), or ijx."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    batch_size: int | Literal["dynamic"] = "dynamic"
    """Number of images a call; dynamic: any number, which tiled inertial layers do not
    allow."""
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    """Platforms that a file of `format` ijx is to run on: cpu, cuda, rocm, tpu. This
    machine need not have them."""
    input: Literal["uint8", "float32"] = "uint8"
    """uint8: raw pixels, which the file resizes and normalises; float32: normalised
    pixels."""
    image_size: int | tuple[int, int] | None = None
    """Height and width of raw pixels; one number: both; None: those of the network's
    input, or those that images are resized to before the centre is cut out."""
    fold: bool | None = None
    """Merge BatchNorm into the kernels before it; None: in ijx, stablehlo and onnx,
    which are only run."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation and of the kernels in the file; None: the checkpoint's in
    ijx and stablehlo, float32 in the others."""


def parse(argv: Sequence[str]) -> Export:
    """Reads the words after the verb."""
    return parse_options(Export, argv, verb="export")
