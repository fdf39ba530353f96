"""`python -m train export`: write a network as a file that other programs run."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inertia_jax import Folded
from inertia_jax.atomic import appearing
from inertia_jax.deploy.exported import check_platforms
from inertia_jax.metadata import Preprocessing, both_sides
from inertia_jax.plan.plan import without_ladders
from train.errors import user_input
from train.evaluate.deployed import deployed, images_to_logits
from train.export.comparison import Logits, compare, random_input
from train.export.formats import (
    WEIGHTS,
    Job,
    choose_format,
    place_of,
    write_ijx,
    write_stablehlo,
)
from train.export.settings import Format
from train.machine.waiting import waiting
from train.networks import TrainedNetwork, read_network, with_dtype
from train.options.export import Export, parse
from train.result import add_result
from train.run.checkpoints import find_checkpoint

_IJX = """\
    import inertia_jax
    network = inertia_jax.load_exported({path!r})
    logits = network(images)  # {dtype} {shape}

    import zipfile, jax.export  # the same with JAX alone
    network = zipfile.ZipFile({path!r}).read("network")
    logits = jax.export.deserialize(network).call(images)"""

_STABLEHLO = """\
    # pip install iree-base-compiler iree-base-runtime
    iree-compile --iree-input-type=stablehlo --iree-hal-target-device=local \\
        --iree-hal-local-target-device-backends=llvm-cpu \\
        --iree-llvmcpu-target-cpu=host {path} -o network.vmfb
    iree-run-module --module=network.vmfb --function=main --input=@images.npy"""
_ONNX = """\
    import onnxruntime
    session = onnxruntime.InferenceSession({path!r})
    (logits,) = session.run(None, {{"images": images}})  # {dtype} {shape}"""
_EXAMPLES = {"ijx": _IJX, "stablehlo": _STABLEHLO, "onnx": _ONNX}


def run(argv: Sequence[str]) -> int:
    """Exports as the arguments say, and compares the file with the checkpoint."""
    args = parse(argv)
    path, out = find_checkpoint(args.checkpoint), pathlib.Path(args.out)
    format_ = choose_format(args.format, out)
    place, weights = place_of(format_, out)
    batch_size = None if args.batch_size == "dynamic" else int(args.batch_size)
    with user_input():
        if place.exists():
            raise ValueError(f"`out` (={place}) must not exist; nothing was changed.")
        check_platforms(args.platforms)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` (={batch_size}) must be >= 1.")
        _check_format(args, format_)
        network = read_network(path, factory=args.factory)
        shape = _image_shape(args, network.preprocessing)
        tiled = [s for s in network.model.plan.inertial if s.reading == "tiled"]
        if batch_size is None and any(spec.capacities for spec in tiled):
            if format_ == "ijx":
                raise ValueError(
                    "the capacities of tiled inertial layers depend on the number of "
                    "images a call; say it, e.g. --batch-size 64."
                )
        dtype = args.dtype or (
            "float32" if format_ in _FLOAT32 else jnp.dtype(network.model.dtype).name
        )
        call, variables = _function(args, network, dtype, format_)
        job = Job(
            network=network,
            path=path,
            call=call,
            variables=variables,
            image_shape=shape,
            image_dtype=args.input,
            batch_size=batch_size,
            platforms=args.platforms,
        )
        with appearing(place) as partial:
            with waiting(f"writing {format_}"):
                logits = _writer(format_, weights)(partial, job)
            with waiting("comparing with the checkpoint's logits"):
                said = _compared(job, logits, dtype)
    print(f"checkpoint  {path}")
    files = [f for f in place.rglob("*") if f.is_file()] if place.is_dir() else [place]
    size = sum(file.stat().st_size for file in files)
    print(f"exported    {place}, {size / 1e6:.1f} MB")
    print(said)
    add_result(
        {"checkpoint": path, "exported": place, "format": format_, "num_bytes": size}
    )
    number = "n" if batch_size is None else batch_size
    shown = f"[{', '.join(map(str, (number, *shape)))}]"
    if format_ in _EXAMPLES:
        example = _EXAMPLES[format_]
        print(f"\n{example.format(path=str(out), dtype=args.input, shape=shown)}")
    else:
        print(f"\n{place / 'README.md'} says how it is loaded.")
    return 0


# Formats that hold float32 alone.
_FLOAT32 = ("onnx", *WEIGHTS)


def _check_format(args: Export, format_: Format) -> None:
    """Raises ValueError where an option does nothing in a format."""
    if args.dtype == "bfloat16" and format_ in _FLOAT32:
        raise ValueError(
            f"`dtype` (=bfloat16) must be float32 for `format` ({format_})."
        )
    if args.platforms != Export.platforms and format_ != "ijx":
        raise ValueError(f"`platforms` (={args.platforms}) does nothing in {format_}.")
    if args.batch_size != "dynamic" and format_ in WEIGHTS:
        raise ValueError(
            f"`batch_size` (={args.batch_size}) does nothing in {format_}, which takes "
            f"any number of images."
        )
    if format_ == "safetensors":
        if args.fold:
            raise ValueError(
                "`fold` (=True) must be False for `format` (=safetensors), whose "
                "weights are those of the network."
            )
        if args.input != "uint8" or args.image_size is not None:
            raise ValueError(
                "`input` and `image_size` do nothing in safetensors, which holds "
                "weights."
            )


def _writer(
    format_: Format, weights: str
) -> Callable[[pathlib.Path, Job], Logits | None]:
    if format_ == "torch":
        from train.export.torch import write_torch

        return functools.partial(write_torch, weights=weights)
    if format_ == "onnx":
        from train.export.torch import write_onnx

        return write_onnx
    if format_ == "safetensors":
        from train.export.safetensors import write_safetensors

        return functools.partial(write_safetensors, weights=weights)
    return write_stablehlo if format_ == "stablehlo" else write_ijx


def _image_shape(args: Export, preprocessing: Preprocessing) -> tuple[int, int, int]:
    height, width, channels = preprocessing.image_shape
    if args.input == "uint8":
        given = args.image_size
        height, width = (
            preprocessing.resized_sides if given is None else both_sides(given)
        )
        if min(height, width) < 1:
            raise ValueError(f"`image_size` (={args.image_size}) must be >= 1.")
    elif args.image_size is not None:
        raise ValueError(
            f"`image_size` (={args.image_size}) must go with `input` (=uint8): "
            f"normalised images have the network's size."
        )
    return height, width, channels


def _function(
    args: Export, network: TrainedNetwork, dtype: str, format_: Format
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Returns the function of variables and images, and prints what it folded."""
    fold = args.fold if args.fold is not None else format_ not in WEIGHTS
    model, variables = deployed(network, dtype, fold=fold)
    if isinstance(model, Folded):
        print(f"folded      {len(model.folded)} BatchNorm layers")
        for norm, reason in model.kept:
            print(f"  {norm} stays: it {reason}")

    def call(variables: Any, images: Any) -> Any:
        to_logits = images_to_logits(
            model, variables, network.preprocessing, args.input
        )
        return to_logits(images)

    return call, variables


def _compared(job: Job, logits: Logits | None, dtype: str) -> str:
    """Returns a line about the file's and the checkpoint's logits on random images.

    Raises:
        UsageError: They differ.
    """
    if logits is None:
        backend = jax.default_backend()
        return f"not compared with the checkpoint's logits: JAX runs on {backend} here"
    network = job.network
    model = without_ladders(network.model)
    if dtype == "float32":
        model = with_dtype(model, jnp.float32)
    before = images_to_logits(
        model, network.variables, network.preprocessing, job.image_dtype
    )
    images = random_input((job.batch_size, *job.image_shape), job.image_dtype)
    expected, found = np.asarray(jax.jit(before)(images)), logits(images)
    has_gates = bool(network.model.plan.inertial)
    return str(compare(expected, found, dtype=dtype, has_gates=has_gates))
