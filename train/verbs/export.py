"""`python -m train export`: write a network as one file that needs JAX alone."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from inertia_jax import fold_batch_norm, load_exported, save_exported
from inertia_jax.deploy.exported import check_platforms
from inertia_jax.metadata import Preprocessing, both_sides
from inertia_jax.plan.plan import without_ladders
from train.arguments import parse_options
from train.config import FactoryOption
from train.errors import UsageError, user_input
from train.evaluate.deployed import images_to_logits, kernels_in_type
from train.networks import TrainedNetwork, read_network, with_dtype
from train.run.checkpoints import find_checkpoint

_EXAMPLE = """\
    import inertia_jax
    network = inertia_jax.load_exported({path!r})
    logits = network(images)  # {dtype} {shape}

    import zipfile, jax.export  # the same with JAX alone
    network = zipfile.ZipFile({path!r}).read("network")
    logits = jax.export.deserialize(network).call(images)"""


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a checkpoint as one file that needs JAX alone to run."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or run, of which the best checkpoint is taken."""
    out: str
    """File to write, which must not exist."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    batch_size: int | Literal["dynamic"] = "dynamic"
    """Number of images a call; dynamic: any number, which tiled inertial layers do not
    allow."""
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    """Platforms that the file is to run on: cpu, cuda, rocm, tpu. This machine need not
    have them."""
    input: Literal["uint8", "float32"] = "uint8"
    """uint8: raw pixels, which the file resizes and normalises; float32: normalised
    pixels."""
    image_size: int | tuple[int, int] | None = None
    """Height and width of raw pixels; one number: both; None: those of the network's
    input, or those that images are resized to before the centre is cut out."""
    fold: bool = True
    """Merge BatchNorm into the kernels before it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation and of the kernels in the file; None: the
    checkpoint's."""


def run(argv: Sequence[str]) -> int:
    """Exports as the arguments say, and compares the file with the checkpoint."""
    args = parse_options(Export, argv, verb="export")
    path, out = find_checkpoint(args.checkpoint), pathlib.Path(args.out)
    batch_size = None if args.batch_size == "dynamic" else int(args.batch_size)
    with user_input():
        if out.exists():
            raise ValueError(f"`out` (={out}) must not exist; nothing was changed.")
        check_platforms(args.platforms)
        network = read_network(path, factory=args.factory)
        shape = _image_shape(args, network.preprocessing)
        tiled = [s for s in network.model.plan.inertial if s.reading == "tiled"]
        if batch_size is None and any(spec.capacities for spec in tiled):
            raise ValueError(
                "the capacities of tiled inertial layers depend on the number of "
                "images a call; say it, e.g. --batch-size 64."
            )
        function = _function(args, network)
        save_exported(
            out,
            function,
            image_shape=shape,
            image_dtype=args.input,
            batch_size=batch_size,
            platforms=args.platforms,
            class_names=network.class_names,
            info={"checkpoint": str(path), **dataclasses.asdict(network.metadata)},
        )
    print(f"checkpoint  {path}")
    print(f"exported    {out}, {out.stat().st_size / 1e6:.1f} MB")
    plain = without_ladders(network.model)
    before = images_to_logits(
        plain, network.variables, network.preprocessing, args.input
    )
    print(_compared(out, before, args.platforms))
    number = "n" if batch_size is None else batch_size
    shown = f"[{', '.join(map(str, (number, *shape)))}]"
    print(f"\n{_EXAMPLE.format(path=str(out), dtype=args.input, shape=shown)}")
    return 0


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


def _function(args: Export, network: TrainedNetwork) -> Callable[[Any], Any]:
    """Returns the function from images to logits, and prints which layers it folded."""
    dtype = jnp.dtype(args.dtype or network.model.dtype)
    if dtype == jnp.float64:
        raise ValueError(
            "the checkpoint computes in float64; `dtype` must be float32 or bfloat16."
        )
    model: nn.Module = with_dtype(network.model, dtype)
    variables: Any = network.variables
    if args.fold:
        shape = network.preprocessing.image_shape
        model, variables = folded = fold_batch_norm(model, variables, image_shape=shape)
        print(f"folded      {len(folded[0].folded)} BatchNorm layers")
        for norm, reason in folded[0].kept:
            print(f"  {norm} stays: it {reason}")
    variables = kernels_in_type(variables, dtype)
    return images_to_logits(model, variables, network.preprocessing, args.input)


def _compared(
    path: pathlib.Path, before: Callable[[Any], Any], platforms: Sequence[str]
) -> str:
    """Returns a line about the file's and the checkpoint's logits on random images."""
    backend = jax.default_backend()
    here = ("cuda", "rocm") if backend == "gpu" else (backend,)
    if not set(here) & set(platforms):
        return f"not compared with the checkpoint's logits: JAX runs on {backend} here"
    network = load_exported(path)
    shape = tuple(size or 8 for size in network.input_shape)
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape).astype(np.float32)
    if network.input_dtype == np.uint8:
        images = rng.integers(256, size=shape).astype(np.uint8)
    expected, found = np.asarray(jax.jit(before)(images)), np.asarray(network(images))
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    if not np.isfinite(found).all():
        raise UsageError(f"{path} gives logits that are not finite.")
    return (
        f"compared    largest difference from the checkpoint's logits "
        f"{difference:.2g} (of {largest:.2g}), the same class on {same} of {shape[0]} "
        f"random images"
    )
