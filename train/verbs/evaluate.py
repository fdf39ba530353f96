"""`python -m train evaluate`: evaluate a checkpoint."""

import contextlib
import json
from collections.abc import Sequence

import jax

from train.evaluate.checkpoint import evaluate_network
from train.evaluate.evaluation import paired_difference
from train.machine.processes import first_devices, joined
from train.networks import read_network
from train.options.evaluate import Evaluate, parse
from train.run.checkpoints import find_checkpoint
from train.run.outputs import check_output_file, write_json


def run(argv: Sequence[str]) -> int:
    """Evaluates as the arguments say, and prints the result."""
    args = parse(argv)
    with joined(args.processes, saves_on_sigterm=False):
        is_first = jax.process_index() == 0  # the only process that prints
        with contextlib.nullcontext() if is_first else contextlib.redirect_stdout(None):
            return _run(args)


def _run(args: Evaluate) -> int:
    if jax.process_index() == 0:  # the only process that writes
        check_output_file("out", args.out)
    first_devices(args.settings.devices)  # before anything is read
    against = find_checkpoint(args.against) if args.against else None
    network = read_network(find_checkpoint(args.checkpoint), factory=args.factory)
    # Before the first evaluation, which may take long.
    other = read_network(against, fallback=args.factory) if against else None
    print(f"checkpoint  {network.path}")
    evaluation = evaluate_network(network, args.settings, source=args.data)
    print(evaluation)
    found = json.loads(evaluation.to_json())
    if other is not None:
        # Only results on the same data can be compared image by image.
        source = args.data or network.source
        baseline = evaluate_network(other, args.settings, source=source)
        difference, margin = paired_difference(baseline, evaluation)
        change = f"{100 * difference:+.2f} points"
        interval = f"95% interval +-{100 * margin:.2f}, paired"
        print(f"\n{other.path}: top-1 {baseline.top1:.2%}; here {change} ({interval})")
        found |= {
            "against": baseline.top1,
            "difference": difference,
            "margin_95": margin,
        }
    if evaluation.gate_rates:
        print(f"\n{network.cost(evaluation.gate_rates)}")
    if jax.process_index() == 0:
        write_json(args.out, found)
    return 0
