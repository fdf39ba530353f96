"""`python -m train evaluate`: evaluate a checkpoint."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

from train.checkpoints import find_checkpoint
from train.config import Data
from train.errors import user_input
from train.evaluate import paired_difference
from train.evaluate_checkpoint import (
    cost_at_rates,
    evaluate_checkpoint,
    recorded_source,
)
from train.outputs import check_output_file
from train.processes import Processes, joined


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates a checkpoint on every test image, each once."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run, whose best is taken."""
    data: str | None = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: what it was trained on."""
    cache_dir: str = Data.cache_dir
    """Where decoded sets are kept."""
    batch_size: int = 500
    """Images a step, over all devices."""
    devices: int | None = None
    """Use the first so many devices; None: all."""
    resize: bool = False
    """Resize images of another size than the network was trained on."""
    flip_test: bool = False
    """Answer by the mean logits of each image and its mirror image."""
    against: str | None = None
    """Another checkpoint, or run, to compare with on the same data, image by image."""
    out: str | None = None
    """Write everything to this file, as JSON."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Processes
    )


def run(argv: Sequence[str]) -> int:
    """Evaluates as the arguments say, and prints what it found."""
    args = tyro.cli(Evaluate, args=argv, prog="python -m train evaluate")
    with joined(args.processes, saves_on_sigterm=False):
        if jax.process_index() != 0:
            # It computes its share; the first speaks for all.
            with contextlib.redirect_stdout(None):
                return _run(args)
        return _run(args)


def _run(args: Evaluate) -> int:
    if jax.process_index() == 0:  # the others write nothing
        check_output_file("out", args.out)
    path = find_checkpoint(args.checkpoint)
    print(f"checkpoint  {path}")
    evaluate = functools.partial(
        evaluate_checkpoint,
        # Of both checkpoints, if there are two: they are compared image by image.
        source=args.data or recorded_source(path),
        cache_dir=args.cache_dir,
        batch_size=args.batch_size,
        num_devices=args.devices,
        resize=args.resize,
        flip_test=args.flip_test,
    )
    other = find_checkpoint(args.against) if args.against else None
    evaluation = evaluate(path)
    print(evaluation)
    found = json.loads(evaluation.to_json())
    if other is not None:
        baseline = evaluate(other)
        difference, margin = paired_difference(baseline, evaluation)
        change = f"{100 * difference:+.2f} points"
        interval = f"95% interval +-{100 * margin:.2f}, paired"
        print(f"\n{other}: top-1 {baseline.top1:.2%}; here {change} ({interval})")
        found |= {
            "against": baseline.top1,
            "difference": difference,
            "margin_95": margin,
        }
    if evaluation.gate_rates:
        print(f"\n{cost_at_rates(path, evaluation.gate_rates)}")
    if args.out is not None and jax.process_index() == 0:
        with user_input():
            pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0
