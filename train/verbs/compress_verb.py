"""`python -m train compress`: make a trained checkpoint smaller."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from flax import linen as nn

from inertia_jax import (
    compress,
    count_cost,
    load_checkpoint,
    make_inertial,
    recalibrate_batch_norm,
    save_checkpoint,
)
from inertia_jax.checkpoint import Metadata, load_metadata
from inertia_jax.plan import Inertial
from train.calibration import training_inputs
from train.checkpoints import find_checkpoint
from train.config import Data
from train.data import load_data
from train.errors import UsageError, user_input
from train.evaluate import Evaluation, paired_difference
from train.evaluate_checkpoint import evaluate_model
from train.layer_report import format_layers, parse_ranks, plan_to_json, report_layers
from train.rundir import describe_machine

Network = tuple[nn.Module, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Compress:
    """Makes a trained network smaller, and evaluates it before and after.

    With `--ranks`, convolutions become Tucker-2 factors; with `--macs`, inertial, in
    tiles. BatchNorm is then recalibrated on training images. Nothing is trained:
    `python -m train finetune OUT` does that.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run, whose best is taken."""
    out: str
    """Directory of the new checkpoint; must not exist."""
    ranks: str | None = None
    """ratio:0.2, energy:0.9, evbmf, budget:macs=0.5 (params, latency), plan:FILE."""
    macs: float | None = None
    """Inertial: share of the network's MACs to keep, friction counted, in (0, 1]."""
    method: Literal["hosvd", "hooi", "inertial"] | None = None
    """How factors are found (None: hosvd), or inertial, which `--macs` means."""
    layers: str = "*"
    """Glob over the paths of the convolutions that may change."""
    keep_stem: bool = False
    """Tucker-2: leave the first convolution as it is."""
    round_to: int = 1
    """Tucker-2: ranks become multiples of it, rounded up."""
    weigh: bool = True
    """Tucker-2: weigh errors by what calibration images show each layer."""
    latency_batch: int = 0
    """Tucker-2: measure each layer's time at so many images a call; 0: do not."""
    tile_size: int = 2
    """Inertial: side of a tile of outputs."""
    metric: Literal["l1", "l2", "max"] = Inertial.metric  # type: ignore[assignment]
    """Inertial: of friction."""
    reference: Literal["center", "core_mean"] = Inertial.reference
    """Inertial: of friction."""
    low: Literal["mean", "sample"] = Inertial.low
    """Inertial: what fills a tile of low friction."""
    channel_stride: int = Inertial.channel_stride
    """Inertial: take friction on every so many channels."""
    data: str | None = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: what it was trained on."""
    cache_dir: str = Data.cache_dir
    """Where decoded sets are kept."""
    calibration_images: int = 512
    """Training images that choose ranks or thresholds, as evaluation would see them."""
    recalibration_images: int = 4096
    """Training images that recalibrate BatchNorm, cropped and flipped as they were."""
    crop_padding: int | None = None
    """Of the training that made the checkpoint; None: as it says, 0 if imported."""
    flip: bool | None = None
    """Likewise."""
    also_test: tuple[str, ...] = ()
    """Further data whose test images are evaluated before and after."""
    record: str | None = None
    """Write what was found to this file, as JSON."""
    seed: int = 1
    """Of the choice of images and their crops."""


def run(argv: Sequence[str]) -> int:
    """Compresses as the arguments say, and prints cost and accuracy."""
    args = tyro.cli(Compress, args=argv, prog="python -m train compress")
    is_inertial = _is_inertial(args)
    path, out = find_checkpoint(args.checkpoint), pathlib.Path(args.out)
    if out.exists():
        raise UsageError(f"`out` (={out}) must not exist; nothing was changed.")
    with user_input():
        dense = load_checkpoint(path)
        metadata = load_metadata(path)
    preprocessing = metadata.preprocessing
    if preprocessing is None:
        raise UsageError(f"{path} has no preprocessing; it cannot be evaluated.")
    trained = metadata.info.get("config", {}).get("data", {})
    source = args.data or trained.get("source")
    if source is None and is_inertial:
        raise UsageError(f"{path} names no data; say which with --data.")
    sources = () if source is None else (source, *args.also_test)
    evaluate = functools.partial(
        _evaluate, metadata=metadata, sources=sources, cache_dir=args.cache_dir
    )
    draw = _drawer(args, source, dense[0], metadata)
    before = evaluate(dense)
    start = time.perf_counter()
    with user_input():
        if is_inertial:
            stages = {"inertial": _make_inertial(args, dense, draw)}
        else:
            shape = preprocessing.image_shape
            stages = _make_tucker2(args, dense, draw, shape)
    seconds = time.perf_counter() - start
    model, variables = list(stages.values())[-1]
    info = {
        **metadata.info,
        "evaluation": None,  # was the dense network's
        "compressed": dataclasses.asdict(args),
    }
    with user_input():
        metadata = Metadata(preprocessing, metadata.class_names, info)
        save_checkpoint(out, model, variables, metadata=metadata)
    after = {name: evaluate(network) for name, network in stages.items()}
    tests = _compare(sources, before, after)
    last = list(after.values())[-1]
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
        print(_in_words(test))
    print(f"took {seconds:.0f} s; checkpoint {out}")
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


def _is_inertial(args: Compress) -> bool:
    if (args.ranks is None) == (args.macs is None):
        raise UsageError(
            f"one of `ranks` (={args.ranks}) and `macs` (={args.macs}) must be given."
        )
    is_inertial = args.macs is not None
    if args.method is not None and is_inertial != (args.method == "inertial"):
        given = "--macs" if is_inertial else "--ranks"
        raise UsageError(f"`method` (={args.method}) must fit {given}.")
    return is_inertial


def _drawer(
    args: Compress, source: str | None, model: nn.Module, metadata: Metadata
) -> Callable[..., Any] | None:
    """Returns a function that draws training images; None if no data are known."""
    if source is None:
        return None
    preprocessing = metadata.preprocessing
    if preprocessing is None:
        raise ValueError("checked by the caller.")
    size = max(preprocessing.image_shape[0], preprocessing.resize or 0)
    data = load_data(source, cache_dir=args.cache_dir, image_size=size)
    if data.train is None:
        raise UsageError(f"{data.name} has no training images to calibrate on.")
    trained = metadata.info.get("config", {}).get("data", {})
    draw = functools.partial(
        training_inputs, data.train, preprocessing, seed=args.seed, dtype=model.dtype
    )

    def draw_some(count: int, *, augmented: bool) -> Any:
        if not augmented:
            return draw(count)
        return draw(
            count,
            crop_padding=_or(args.crop_padding, trained.get("crop_padding", 0)),
            flip=_or(args.flip, trained.get("flip", False)),
            resized_crop=trained.get("resized_crop", False),
        )

    return draw_some


def _make_inertial(
    args: Compress, dense: Network, draw: Callable[..., Any] | None
) -> Network:
    if draw is None or args.macs is None:
        raise ValueError("checked by the caller.")
    return make_inertial(
        *dense,
        macs=args.macs,
        calibration=draw(args.calibration_images, augmented=False),
        recalibration=draw(args.recalibration_images, augmented=True),
        layers=args.layers,
        tile_size=args.tile_size,
        metric=args.metric,
        reference=args.reference,
        low=args.low,
        channel_stride=args.channel_stride,
    )


def _make_tucker2(
    args: Compress,
    dense: Network,
    draw: Callable[..., Any] | None,
    image_shape: tuple[int, int, int],
) -> dict[str, Network]:
    """Returns the compressed network as it comes, and recalibrated if it can be."""
    rule = parse_ranks(args.ranks or "")
    calibration = None
    if args.weigh and draw is not None:
        calibration = draw(args.calibration_images, augmented=False)
    raw = compress(
        *dense,
        ranks=rule,
        method="hooi" if args.method == "hooi" else "hosvd",
        calibration=calibration,
        layers=args.layers,
        keep_stem=args.keep_stem,
        round_to=args.round_to,
        image_shape=image_shape,
    )
    if draw is None or not args.recalibration_images or "batch_stats" not in raw[1]:
        return {"raw": raw}
    images = draw(args.recalibration_images, augmented=True)
    return {
        "raw": raw,
        "recalibrated": (raw[0], recalibrate_batch_norm(*raw, images)),
    }


def _evaluate(
    network: Network, *, metadata: Metadata, sources: Sequence[str], cache_dir: str
) -> list[Evaluation]:
    return [
        evaluate_model(*network, metadata, source=source, cache_dir=cache_dir)
        for source in sources
    ]


def _compare(
    sources: Sequence[str],
    before: Sequence[Evaluation],
    after: Mapping[str, Sequence[Evaluation]],
) -> list[dict[str, Any]]:
    """Returns accuracy on every test set, before and after every stage."""
    tests = []
    for i, source in enumerate(sources):
        stages = {}
        for name, evaluations in after.items():
            difference, margin = paired_difference(before[i], evaluations[i])
            stages[name] = {
                "top1": evaluations[i].top1,
                "difference": difference,
                "margin_95": margin,
                "gate_rates": dict(evaluations[i].gate_rates),
            }
        tests.append(
            {
                "data": pathlib.PurePath(source).name,
                "num_examples": before[i].num_examples,
                "top1_before": before[i].top1,
                "stages": stages,
            }
        )
    return tests


def _in_words(test: Mapping[str, Any]) -> str:
    parts = [f"{test['data']}: top-1 {test['top1_before']:.2%} before"]
    parts += [
        f"{name} {stage['top1']:.2%} ({100 * stage['difference']:+.2f} "
        f"+-{100 * stage['margin_95']:.2f})"
        for name, stage in test["stages"].items()
    ]
    return (
        f"{', '.join(parts)}; points, 95% interval, paired, "
        f"{test['num_examples']:,} images"
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
