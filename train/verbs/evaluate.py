"""`python -m train evaluate`: evaluate a checkpoint."""

import contextlib
import functools
import json
from collections.abc import Sequence

import jax

from inertia_jax.plan.plan import Plan, plan_of
from train.evaluate.checkpoint import evaluate_network, held_out_of_all
from train.evaluate.evaluation import paired_difference
from train.machine.processes import first_devices, joined
from train.networks import (
    cost_in_words,
    cost_to_json,
    kinds_in_words,
    name_in_words,
    read_network,
)
from train.options.evaluate import Evaluate, parse
from train.result import add_result
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
    source = args.data or network.source
    held_out = None
    if other is not None and source is not None:
        held_out = held_out_of_all((network, other), source)
    print(f"checkpoint  {network.path}")
    cost = network.cost()
    print(f"network     {name_in_words(network.model)}")
    print(f"layers      {kinds_in_words(cost)}")
    evaluate = functools.partial(
        evaluate_network, settings=args.settings, source=source, held_out=held_out
    )
    evaluation = evaluate(network)
    if evaluation.gate_rates:
        cost = network.cost(evaluation.gate_rates)
    print(f"cost        {cost_in_words(cost)}")
    print(evaluation)
    found = json.loads(evaluation.to_json()) | cost_to_json(cost)
    found |= {"plan": json.loads((plan_of(network.model) or Plan()).to_json())}
    if other is not None:
        baseline = evaluate(other)
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
        print(f"\n{cost}")
    add_result({"checkpoint": network.path, **found})
    if jax.process_index() == 0:
        write_json(args.out, found)
    return 0
