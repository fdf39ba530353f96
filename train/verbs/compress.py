"""`python -m train compress`: make a trained checkpoint smaller."""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from inertia_jax import count_cost
from inertia_jax.calls import Network
from inertia_jax.compression.chip_times import chip_times
from inertia_jax.compression.latency import network_latencies_ms
from train.command import shell_command
from train.compress import augmentation
from train.compress.accuracy import compare_stages, in_words, stage_evaluator
from train.compress.checks import (
    check_layers,
    check_options,
    check_options_without_data,
)
from train.compress.layer_report import format_layers, report_layers
from train.compress.options import AUGMENTATION, Compress
from train.compress.progress import shown_progress
from train.compress.rank_rules import plan_to_json
from train.compress.stages import (
    compressed_stages,
    images_to_time,
    load_training_images,
    read_compressed,
    save_compressed,
)
from train.config import FINETUNE, Config
from train.errors import UsageError, user_input
from train.fit.checks import check_batch_size
from train.fit.loop import FitResult, exit_code, fit
from train.machine.waiting import waiting
from train.networks import (
    TrainedNetwork,
    cost_to_json,
    from_checkpoint,
    read_description,
    read_network,
)
from train.options.compress import parse
from train.result import add_result
from train.run.checkpoints import find_checkpoint, last_checkpoint
from train.run.directory import describe_machine
from train.run.outputs import write_json


def run(argv: Sequence[str]) -> int:
    """Compresses as the arguments say, and prints cost and accuracy."""
    args = parse(argv)
    check_options(args)
    path, out = find_checkpoint(args.checkpoint), pathlib.Path(args.out)
    is_made = args.resume and out.exists()
    for place in (out, _tuned_beside(out)):
        is_written = place == out or args.finetune_epochs
        if place.exists() and is_written and not is_made:
            raise UsageError(
                f"`out` (={place}) must not exist; nothing was changed."
                f"{_how_to_resume(args, argv)}"
            )
    network = read_network(path, factory=args.factory)
    check_layers(args, network)
    dense = (network.model, network.variables)
    args = _completed(args, network)
    sources = () if args.data is None else (args.data, *args.also_test)
    evaluate = stage_evaluator(
        description=network, sources=sources, cache_dir=args.cache_dir
    )
    is_timed_on_images = args.is_inertial and args.timed_batch > 0
    split = None
    if is_timed_on_images or not is_made:
        split = load_training_images(args, network)
    if args.finetune_epochs and split is not None and not is_made:
        batch_size = args.finetune_batch_size
        check_batch_size(
            "finetune_batch_size", batch_size, len(split), jax.device_count()
        )
    before = evaluate({"before": dense})["before"]
    if is_made:
        small, results = read_compressed(args)
    else:
        start = time.perf_counter()
        with user_input(), shown_progress() as progress:
            stages = compressed_stages(args, network, split, progress=progress)
        seconds = time.perf_counter() - start
        small = next(reversed(stages.values()))
        tests = compare_stages(sources, before, evaluate(stages))
        results = {"seconds": seconds, "tests": tests}
        save_compressed(args, network, small, results=results)
    tests = results["tests"]
    if args.finetune_epochs:
        config = _tuning_config(args, path, out)
        result = fit(config, workdir=_tuned_beside(out), resume=args.resume)
        if result.stopped_by is not None:
            print(_resume_command(argv, out, result))
            return exit_code(result)
        tuned = read_network(last_checkpoint(result.workdir))
        print(f"fine-tuned checkpoint {tuned.path}")
        after = evaluate({"fine-tuned": (tuned.model, tuned.variables)})
        for test, new in zip(
            tests, compare_stages(sources, before, after), strict=True
        ):
            test["stages"] |= new["stages"]
    images = None  # gates depend on them
    if is_timed_on_images and split is not None:
        images = images_to_time(args, network, split)
    seconds = results["seconds"]
    _report(args, network, small, tests=tests, seconds=seconds, images=images)
    return 0


def _report(
    args: Compress,
    dense: TrainedNetwork,
    small: Network,
    *,
    tests: Sequence[Mapping[str, Any]],
    seconds: float,
    images: Any,
) -> None:
    """Prints cost and accuracy of the new network, and writes the record."""
    shape = dense.preprocessing.image_shape
    last = list(tests[0]["stages"].values())[-1] if tests else {}
    cost = count_cost(small[0], shape, gate_rates=last.get("gate_rates"))
    rows = []
    times_ms: list[float] = []
    if args.is_inertial:
        print(cost)
        print(_where_counted(args, tests))
    else:
        with waiting("measuring the layers"):
            rows = report_layers(
                (dense.model, dense.variables),
                small,
                shape,
                latency_batch=args.timed_batch,
                device=args.device,
            )
        print(format_layers(rows, args.device))
        for layer in cost.rows:
            if layer.note:
                print(f"{layer.path} stays dense: {layer.note}")
        old = dense.cost()
        print(
            f"network: {old.params:,} -> {cost.params:,} parameters, "
            f"{old.total_macs:,} -> {cost.total_macs:,} MACs, "
            f"{cost.total_macs / cost.dense_macs:.3f} of the dense network's"
        )
    if args.timed_batch:
        networks = [(dense.model, dense.variables), small]
        batch_size = args.timed_batch if images is None else len(images)
        if args.device is None:
            where, how = "here", "measured in turn"
            times_ms = network_latencies_ms(
                networks, shape, batch_size=batch_size, images=images
            )
        else:
            where, how = f"on {args.device}", "as its compiler estimates"
            times_ms = [
                chip_times(each, shape, device=args.device, batch_size=batch_size).ms
                for each in networks
            ]
        before, after = times_ms
        print(
            f"network {where}: {before:.3g} -> {after:.3g} ms a call of "
            f"{batch_size} images, {after / before:.3f} of the time, {how}"
        )
    for test in tests:
        print(in_words(test))
    print(f"took {seconds:.0f} s; checkpoint {args.out}")
    if not args.is_inertial and not args.finetune_epochs:
        print(_finetune_advice(args))
    if args.finetune_epochs:
        print(f"fine-tuned: the run {_tuned_beside(pathlib.Path(args.out))}")
    record = {
        "machine": describe_machine(),
        "seconds": seconds,
        "augmentation": {name: getattr(args, name) for name in AUGMENTATION},
        **cost_to_json(cost),
        "tests": tests,
        "device": args.device,
        "batch_size": args.timed_batch,
        "latency_ms": times_ms,
        "layers": [dataclasses.asdict(row) for row in rows],
        "plan": plan_to_json(small[0].plan),
    }
    add_result({"checkpoint": args.out, **record})
    write_json(args.record, record)


def _completed(args: Compress, network: TrainedNetwork) -> Compress:
    """Returns the options with data and augmentation of the training filled in.

    Raises:
        UsageError: The options need data or their augmentation, and none is known.
    """
    source = args.data or network.source
    if source is None and (args.is_inertial or args.finetune_epochs):
        raise UsageError(f"{network.path} names no data; say which with --data.")
    if source is None:
        check_options_without_data(args)
        print(
            f"{network.path} names no data: errors are not weighed, BatchNorm is not "
            f"recalibrated, accuracy is not measured; --data says which to use."
        )
    args = dataclasses.replace(args, data=source)
    completed = augmentation.with_augmentation(args, network)
    if augmentation.uses_augmentation(args, network):
        print(augmentation.in_words(args, network))
    return completed


def _tuning_config(args: Compress, teacher: pathlib.Path, out: pathlib.Path) -> Config:
    """Returns the configuration that trains the compressed checkpoint."""
    compressed = read_description(out)
    config = from_checkpoint(FINETUNE, compressed, keep_data=False)
    return dataclasses.replace(
        config,
        name=out.name,
        seed=args.seed,
        epochs=args.finetune_epochs,
        batch_size=args.finetune_batch_size,
        data=dataclasses.replace(
            config.data,
            source=args.data or "",
            cache_dir=args.cache_dir or compressed.cache_dir,
            **{name: getattr(args, name) for name in AUGMENTATION},
        ),
        teacher=str(teacher.absolute()),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=args.finetune_learning_rate
        ),
    )


def _where_counted(args: Compress, tests: Sequence[Mapping[str, Any]]) -> str:
    """Returns on which images the gate rates of an inertial network's cost are."""
    first = ", the first test set" if len(tests) > 1 else ""
    share = (
        f"--macs {args.macs}" if args.latency is None else f"--latency {args.latency}"
    )
    images = f"{tests[0]['num_examples']:,} test images of {tests[0]['data']}{first}"
    return (
        f"gate rates as on the {images}; "
        f"{share} holds on the training images that chose the thresholds, "
        f"{args.calibration_images:,} at most"
    )


def _finetune_advice(args: Compress) -> str:
    """Returns how to regain accuracy that the factors have cost, as commands."""
    data = () if args.data else ("--data", "SOURCE")
    command = shell_command("finetune", args.out, "--teacher", args.checkpoint, *data)
    return (
        f"not fine-tuned, which regains accuracy: add --finetune-epochs 5 to this "
        f"command (with another --out), or run\n{command}"
    )


def _tuned_beside(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f"{out.name}_finetuned")


def _how_to_resume(args: Compress, argv: Sequence[str]) -> str:
    """Returns what goes on where a kill may have ended the fine-tuning."""
    if args.resume or not args.finetune_epochs or not pathlib.Path(args.out).exists():
        return ""
    command = shell_command("compress", *argv, "--resume")
    return f" If its fine-tuning was ended, this goes on with it:\n{command}"


def _resume_command(argv: Sequence[str], out: pathlib.Path, result: FitResult) -> str:
    """Returns the command that goes on after a signal stopped the fine-tuning."""
    words = [*argv, *([] if "--resume" in argv else ["--resume"])]
    return (
        f"stopped and saved at step {result.step}; the compressed checkpoint is {out}; "
        f"this goes on with its fine-tuning:\n{shell_command('compress', *words)}"
    )
