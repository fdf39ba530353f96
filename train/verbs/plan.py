"""`python -m train plan`: what stands at each layer of a checkpoint's network."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from inertia_jax.plan.plan import Plan, plan_of
from train.networks import (
    NetworkDescription,
    cost_to_json,
    name_in_words,
    read_description,
)
from train.options.plan import parse
from train.result import add_result
from train.run.checkpoints import find_checkpoint
from train.run.outputs import check_output_file, write_json


def run(argv: Sequence[str]) -> int:
    """Prints a plan and the cost of each layer; no variables are read."""
    args = parse(argv)
    check_output_file("out", args.out)
    network = read_description(find_checkpoint(args.checkpoint), factory=args.factory)
    found = plan_to_json(network)
    rates = network.gate_rates
    shape = "x".join(map(str, network.preprocessing.image_shape))
    print(f"checkpoint  {network.path}")
    print(f"network     {name_in_words(network.model)}, input {shape}")
    print(f"{plan_of(network.model) or Plan()}\n")
    print(network.cost(rates))
    if rates:
        print("gate rates as the training run last measured them")
    add_result({"checkpoint": network.path, **found})
    write_json(args.out, found["plan"])
    return 0


def plan_to_json(network: NetworkDescription) -> dict[str, Any]:
    """Returns a network's plan, and what each of its layers costs."""
    plan = plan_of(network.model) or Plan()
    cost = network.cost(network.gate_rates)
    return {
        "network": name_in_words(network.model),
        "image_shape": network.preprocessing.image_shape,
        "plan": json.loads(plan.to_json()),
        "cost": cost_to_json(cost),
        "layers": [dataclasses.asdict(row) for row in cost.rows],
    }
