"""`python -m train compress`: make a trained checkpoint smaller."""

import dataclasses
import functools
import json
import pathlib
import shlex
import time
from collections.abc import Sequence
from typing import Any

import tyro

from inertia_jax import count_cost, save_checkpoint
from inertia_jax.metadata import Metadata
from train.checkpoints import find_checkpoint
from train.errors import UsageError, user_input
from train.layer_report import format_layers, plan_to_json, report_layers
from train.loop import FitResult, fit
from train.networks import (
    from_checkpoint,
    last_checkpoint,
    read_description,
    read_network,
)
from train.rundir import describe_machine
from train.stages import Network, compare_stages, evaluate_stages, in_words
from train.verbs.compress_options import (
    Compress,
    check_options,
    check_options_without_data,
)
from train.verbs.compress_stages import IMPORTED, compressed_stages, drawer
from train.verbs.finetune_verb import DEFAULTS
from train.verbs.fit_verb import exit_code


def run(argv: Sequence[str]) -> int:
    """Compresses as the arguments say, and prints cost and accuracy."""
    args = tyro.cli(Compress, args=argv, prog="python -m train compress")
    is_inertial = check_options(args)
    path, out = find_checkpoint(args.checkpoint), pathlib.Path(args.out)
    for place in (out, out.with_name(f"{out.name}_finetuned")):
        if place.exists() and (place == out or args.finetune_epochs):
            raise UsageError(f"`out` (={place}) must not exist; nothing was changed.")
    network = read_network(path)
    dense = (network.model, network.variables)
    preprocessing = network.preprocessing
    trained_on = network.trained_on or IMPORTED
    source = args.data or network.source
    if source is None and (is_inertial or args.finetune_epochs):
        raise UsageError(f"{path} names no data; say which with --data.")
    if source is None:
        check_options_without_data(args)
        print(
            f"{path} names no data: errors are not weighed, BatchNorm is not "
            f"recalibrated, accuracy is not measured; --data says which to use."
        )
    args = dataclasses.replace(
        args,
        crop_padding=_or(args.crop_padding, trained_on.crop_padding),
        flip=_or(args.flip, trained_on.flip),
    )
    sources = () if source is None else (source, *args.also_test)
    evaluate = functools.partial(
        evaluate_stages, description=network, sources=sources, cache_dir=args.cache_dir
    )
    draw = drawer(args, source, network)
    before = evaluate({"before": dense})["before"]
    start = time.perf_counter()
    with user_input():
        stages = compressed_stages(args, dense, draw, preprocessing.image_shape)
    seconds = time.perf_counter() - start
    model, variables = next(reversed(stages.values()))
    info = {
        **network.info,
        "evaluation": None,  # was the dense network's
        "compressed": dataclasses.asdict(args),
    }
    with user_input():
        metadata = Metadata(preprocessing, network.class_names, info)
        save_checkpoint(out, model, variables, metadata=metadata)
    if args.finetune_epochs:
        tuned = _finetune(args, path, out, source)
        if isinstance(tuned, FitResult):
            print(_how_to_go_on(args, path, out, source, tuned))
            return exit_code(tuned)
        stages["fine-tuned"] = tuned
    after = evaluate(stages)
    tests = compare_stages(sources, before, after)
    last = next(reversed(after.values()))
    rates = last[0].gate_rates if last else {}
    cost = count_cost(model, preprocessing.image_shape, gate_rates=rates)
    layers: list[dict[str, Any]] = []
    if is_inertial:
        print(cost)
    else:
        rows = report_layers(
            dense,
            (model, variables),
            preprocessing.image_shape,
            latency_batch=args.latency_batch,
        )
        layers = [dataclasses.asdict(row) for row in rows]
        print(format_layers(rows))
        was = count_cost(dense[0], preprocessing.image_shape)
        print(
            f"network: {was.params:,} -> {cost.params:,} parameters, "
            f"{was.macs:,} -> {cost.macs:,} MACs, {cost.macs / cost.dense_macs:.3f} of "
            f"the dense network's"
        )
    for test in tests:
        print(in_words(test))
    print(f"took {seconds:.0f} s; checkpoint {out}")
    if args.finetune_epochs:
        print(f"fine-tuned: the run {_tuned_beside(out)}")
    if args.record is not None:
        record = {
            "machine": describe_machine(),
            "seconds": seconds,
            "params": cost.params,
            "dense_macs": cost.dense_macs,
            "macs": cost.macs,
            "ladder_macs": cost.ladder_macs,
            "other_ops": cost.other_ops,
            "total_macs": cost.total_macs,
            "tests": tests,
            "layers": layers,
            "plan": plan_to_json(model.plan),
        }
        with user_input():
            pathlib.Path(args.record).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _finetune(
    args: Compress, teacher: pathlib.Path, out: pathlib.Path, source: str | None
) -> Network | FitResult:
    """Trains the compressed checkpoint; returns how it ended if a signal stopped it."""
    if source is None:
        raise UsageError("`finetune_epochs` needs data; say which with --data.")
    config = from_checkpoint(DEFAULTS, read_description(out), keep_data=False)
    data = dataclasses.replace(
        config.data,
        source=source,
        cache_dir=args.cache_dir,
        crop_padding=args.crop_padding or 0,
        flip=bool(args.flip),
    )
    config = dataclasses.replace(
        config,
        name=out.name,
        seed=args.seed,
        epochs=args.finetune_epochs,
        data=data,
        teacher=str(teacher.absolute()),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=args.finetune_learning_rate
        ),
    )
    workdir = _tuned_beside(out)
    result = fit(config, workdir=workdir, resume=False)
    if result.stopped_by is not None:
        return result
    tuned = read_network(last_checkpoint(workdir))
    print(f"fine-tuned checkpoint {tuned.path}")
    return tuned.model, tuned.variables


def _tuned_beside(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f"{out.name}_finetuned")


def _how_to_go_on(
    args: Compress,
    teacher: pathlib.Path,
    out: pathlib.Path,
    source: str | None,
    result: FitResult,
) -> str:
    """Returns the command that goes on with the fine-tuning that was stopped."""
    flip = "flip" if args.flip else "no-flip"
    words = ["python", "-m", "train", "finetune", str(out), "--resume"]
    words += ["--workdir", str(result.workdir), "--name", out.name]
    words += ["--epochs", str(args.finetune_epochs), "--seed", str(args.seed)]
    words += ["--teacher", str(teacher.absolute()), "--data.source", str(source)]
    words += ["--data.cache-dir", args.cache_dir, f"--data.{flip}"]
    words += ["--data.crop-padding", str(args.crop_padding or 0)]
    words += ["--optimizer.learning-rate", str(args.finetune_learning_rate)]
    return (
        f"stopped and saved at step {result.step}; the compressed checkpoint is {out}; "
        f"this goes on with its fine-tuning:\n{shlex.join(words)}"
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
