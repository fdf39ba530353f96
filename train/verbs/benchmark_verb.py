"""`python -m train benchmark`: measure steps, the loop around them, and layers."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import tyro

from train.bench_inertial import OP_SHAPES, bench_network, bench_op, format_times
from train.bench_infer import bench_infer, format_infer
from train.bench_loop import bench_loop
from train.bench_memory import bench_memory, format_memory
from train.bench_ops import STAGES, bench_ops, format_ops
from train.bench_startup import bench_startup
from train.bench_sweep import bench_sweep, format_sweep
from train.bench_train import bench_model
from train.bench_tucker import bench_tucker, format_tucker
from train.config import Config, Data
from train.config_file import load_config
from train.data import ImageSet, load_data
from train.errors import UsageError, user_input
from train.outputs import check_output_file
from train.rundir import describe_machine
from train.sweep import load_sweep
from train.timing import measure_peak_gflops


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measures, in one run and in turn: medians of repeated calls."""

    suite: Literal[
        "train",
        "infer",
        "ops",
        "memory",
        "startup",
        "loop",
        "inertial",
        "tucker",
        "sweep",
    ] = "train"
    """train: steps and evaluations of networks; infer: dense, compressed and tiled
    networks as they are exported, BatchNorm folded, at batch 1 and `batch_size`; ops:
    convolutions, their gradients, and what stands in for them; memory: peak of a
    process that trains; startup: seconds to the first step; loop: what a run adds to
    its steps; inertial: tiled convolutions and networks beside dense ones; tucker:
    compressed networks beside dense ones, at both batches; sweep: a sweep's networks,
    trained for `steps`, beside each other."""
    models: tuple[Literal["resnet18", "vgg16", "simpledla"], ...] = (
        "resnet18",
        "vgg16",
        "simpledla",
    )
    """Of the suites train, infer, memory and tucker."""
    batch_size: int = 64
    """Of the suites train, infer, ops, memory, inertial, tucker and, for evaluation,
    sweep."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation in the suites train and ops."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """Of resnet18 in the suite tucker; imagenet: torchvision's, with its 1,000 classes,
    at 224 x 224."""
    width: float | None = None
    """Of the networks; None: the config's in the suite loop, else 1."""
    against: Literal["none", "torch"] = "none"
    """torch: the same in PyTorch, in turn; in the suite tucker, TensorLy too."""
    repeats: int = 9
    """Timed calls of each; blocks of each in the suite loop, at least 6."""
    config: str = "configs/cifar10_resnet18_small.py"
    """Of the suite loop."""
    data: str | None = None
    """Of the suites loop and sweep; None: the config's."""
    steps: int = 200
    """Of the suite loop, a block; of the suite sweep, before it; at most an epoch."""
    sweep: str = "configs/sweeps/mnist_inertial.py"
    """Of the suite sweep."""
    out: str | None = None
    """Write the record to this file, as JSON."""


def _bench_inertial(args: Benchmark) -> Iterator[Any]:
    rates = (0.1, 0.25, 0.5, 1.0)
    for shape in OP_SHAPES:
        row = bench_op(*shape, rates=rates, repeats=args.repeats)
        print(format_times(row), flush=True)
        yield row
    for name in ("resnet20", "resnet18"):
        row = bench_network(
            name,
            batch_size=args.batch_size,
            width=args.width or 1.0,
            rates=rates,
            repeats=args.repeats,
        )
        print(format_times(row), flush=True)
        yield row


def _each_model(
    args: Benchmark,
    measure: Callable[..., Any],
    describe: Callable[[Any], str],
    **options: Any,
) -> Iterator[Any]:
    for name in args.models:
        with user_input():
            row = measure(
                name,
                width=args.width or 1.0,
                against_torch=args.against == "torch",
                **options,
            )
        print(describe(row), flush=True)
        yield row


def _both_batches(args: Benchmark) -> dict[str, Any]:
    sizes = tuple(sorted({1, args.batch_size}))
    return {"batch_sizes": sizes, "repeats": args.repeats}


def _bench_tucker(args: Benchmark) -> Iterator[Any]:
    options = {**_both_batches(args), "stem": args.stem}
    return _each_model(args, bench_tucker, format_tucker, **options)


def _bench_infer(args: Benchmark) -> Iterator[Any]:
    return _each_model(args, bench_infer, format_infer, **_both_batches(args))


def _bench_memory(args: Benchmark) -> Iterator[Any]:
    return _each_model(args, bench_memory, format_memory, batch_size=args.batch_size)


def _bench_train(args: Benchmark) -> Iterator[Any]:
    peak = measure_peak_gflops(args.dtype)
    print(f"product of two large matrices: {peak:,.0f} GFLOP/s")
    print(
        "network     what   batch  JAX ms  images/s  of peak  PyTorch ms  JAX / PyTorch"
    )
    for name in args.models:
        with user_input():
            row = bench_model(
                name,
                batch_size=args.batch_size,
                repeats=args.repeats,
                width=args.width or 1.0,
                against_torch=args.against == "torch",
                dtype=args.dtype,
                peak_gflops=peak,
            )
        for what in ("train", "eval"):
            ours = row[what]["jax"]
            line = (
                f"{name:<11} {what:<5} {args.batch_size:6d}  {ours['median_ms']:6.1f}"
            )
            line += f"  {ours['images_per_s']:8,.0f}  {ours['share_of_peak']:7.1%}"
            if "torch" in row[what]:
                theirs = row[what]["torch"]["median_ms"]
                line += f"  {theirs:10.1f}  {ours['median_ms'] / theirs:13.2f}"
            print(line, flush=True)
        yield {**row, "peak_gflops": peak}


def _bench_ops(args: Benchmark) -> Iterator[Any]:
    peak = measure_peak_gflops(args.dtype)
    print(f"product of two large matrices: {peak:,.0f} GFLOP/s")
    for side, channels in STAGES:
        with user_input():
            row = bench_ops(
                side,
                channels,
                batch_size=args.batch_size,
                repeats=args.repeats,
                dtype=args.dtype,
                against_torch=args.against == "torch",
                peak_gflops=peak,
            )
        print(format_ops(row), flush=True)
        yield {**row, "peak_gflops": peak}


def _bench_startup(args: Benchmark) -> Iterator[Any]:
    row = bench_startup(repeats=args.repeats)
    for name, of in row.items():
        print(f"first step, {name}: {of['median_s']:.1f} s after the command")
    yield row


def _bench_loop(args: Benchmark) -> Iterator[Any]:
    config = load_config(args.config)
    if args.width is not None:
        model = dataclasses.replace(config.model, width=args.width)
        config = dataclasses.replace(config, model=model)
    config = _with_data(config, args.data)
    row = bench_loop(config, _load(config.data), steps=args.steps, rounds=args.repeats)
    step_ms = row["bare"]["median_ms"] / row["steps"]
    print(f"a bare step {step_ms:.1f} ms, {row['steps_per_epoch']} an epoch")
    print(f"an epoch's first input {row['first_input']['median_ms']:.0f} ms, ", end="")
    print(f"checkpoint {row['checkpoint']['median_ms']:.0f} ms")
    of = {k: f"{v:.2%}" for k, v in row["added_to_steps"].items()}
    interval = f"95% interval {of['low_95']} to {of['high_95']}"
    print(f"the loop adds to steps: {of['median']} ({interval})")
    print(f"the loop adds to an epoch: {row['added_to_epoch']:.2%}")
    yield row


def _bench_sweep(args: Benchmark) -> Iterator[Any]:
    sweep = load_sweep(pathlib.Path(args.sweep))
    rows = bench_sweep(
        [_with_data(config, args.data) for config in sweep.configs],
        _load,
        batch_size=args.batch_size,
        steps=args.steps,
        repeats=args.repeats,
    )
    print(format_sweep(rows))
    yield from rows


def _with_data(config: Config, source: str | None) -> Config:
    if source is None:
        return config
    data = dataclasses.replace(config.data, source=source)
    return dataclasses.replace(config, data=data)


def _load(data: Data) -> ImageSet:
    return load_data(data.source, cache_dir=data.cache_dir, image_size=data.load_size)


# Options that some suites alone look at.
_OF_SUITES = {
    "models": ("train", "infer", "memory", "tucker"),
    "batch_size": ("train", "infer", "ops", "memory", "inertial", "tucker", "sweep"),
    "dtype": ("train", "ops"),
    "stem": ("tucker",),
    "width": ("train", "infer", "memory", "tucker", "inertial", "loop"),
    "against": ("train", "infer", "ops", "memory", "tucker"),
    "config": ("loop",),
    "data": ("loop", "sweep"),
    "steps": ("loop", "sweep"),
    "sweep": ("sweep",),
}
_SUITES: dict[str, Callable[[Benchmark], Iterator[Any]]] = {
    "train": _bench_train,
    "infer": _bench_infer,
    "ops": _bench_ops,
    "memory": _bench_memory,
    "startup": _bench_startup,
    "loop": _bench_loop,
    "inertial": _bench_inertial,
    "tucker": _bench_tucker,
    "sweep": _bench_sweep,
}


def run(argv: Sequence[str]) -> int:
    """Measures as the arguments say, and prints a table."""
    args = tyro.cli(Benchmark, args=argv, prog="python -m train benchmark")
    for name in ("repeats", "batch_size", "steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"`{name}` (={getattr(args, name)}) must be >= 1.")
    check_output_file("out", args.out)
    for name, suites in _OF_SUITES.items():
        value = getattr(args, name)
        if args.suite not in suites and value != getattr(Benchmark, name):
            raise UsageError(
                f"`{name}` (={value}) does nothing in the suite {args.suite}."
            )
    if args.stem != "cifar" and (args.suite, args.models) != ("tucker", ("resnet18",)):
        raise UsageError(
            f"`stem` (={args.stem}) is for `suite` (=tucker) and `models` (=resnet18)."
        )
    rows = list(_SUITES[args.suite](args))
    if args.out is not None:
        with user_input():
            record = {"machine": describe_machine(), "rows": rows}
            pathlib.Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0
