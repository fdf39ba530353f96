"""`python -m train models`: the networks, with their parameters and MACs."""

import dataclasses
from collections.abc import Sequence

from inertia_jax import MODEL_NAMES, CostTable, count_cost, create_model
from inertia_jax.cost.table import aligned
from inertia_jax.models.create import input_shape
from inertia_jax.models.names import check_model_name
from train.errors import UsageError, user_input
from train.options.models import Models, parse
from train.result import add_result


def run(argv: Sequence[str]) -> int:
    """Prints the networks, or the layers of one."""
    args = parse(argv)
    if args.name is not None:
        with user_input():
            check_model_name("name", args.name)
    for name in ("stem", "shortcut"):
        value = getattr(args, name)
        if args.name is None and value != getattr(Models, name):
            raise UsageError(f"`{name}` (={value}) does nothing without a NAME.")
    shown, found = [["network", "input", "parameters", "MACs"]], []
    for name in [args.name] if args.name else MODEL_NAMES:
        shape, cost = _count(name, args)
        if args.name:
            print(cost)
        shown.append(
            [name, "x".join(map(str, shape)), f"{cost.params:,}", f"{cost.macs:,}"]
        )
        found.append(
            {
                "name": name,
                "input_shape": shape,
                "params": cost.params,
                "macs": cost.macs,
                "layers": [dataclasses.asdict(row) for row in cost.rows],
            }
        )
    if not args.name:
        print(aligned(shown, left=2))
    add_result({"models": found})
    return 0


def _count(name: str, args: Models) -> tuple[tuple[int, int, int], CostTable]:
    """Returns the shape of a network's input, and what the network costs."""
    with user_input():
        model = create_model(
            name,
            num_classes=args.num_classes,
            width=args.width,
            stem=args.stem,
            shortcut=args.shortcut,
        )
    shape = input_shape(model)
    return shape, count_cost(model, shape)
