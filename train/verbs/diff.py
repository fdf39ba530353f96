"""`python -m train diff`: in what two checkpoints differ."""

import functools
from collections.abc import Sequence

from train.evaluate.checkpoint import evaluate_network, held_out_of_all
from train.networks import read_network
from train.options.diff import parse
from train.result import add_result
from train.run.checkpoints import find_checkpoint
from train.run.outputs import check_output_file, write_json
from train.side_by_side import compare_answers, compare_networks, in_words


def run(argv: Sequence[str]) -> int:
    """Compares as the arguments say, and prints what differs."""
    args = parse(argv)
    check_output_file("out", args.out)
    # Both are looked for before either is read, which may take long.
    paths = [find_checkpoint(path) for path in (args.first, args.second)]
    first, second = (read_network(path, factory=args.factory) for path in paths)
    found = compare_networks(first, second)
    if args.data is not None:
        held_out = held_out_of_all((first, second), args.data)
        evaluate = functools.partial(
            evaluate_network,
            settings=args.settings,
            source=args.data,
            held_out=held_out,
        )
        found["answers"] = compare_answers(evaluate(first), evaluate(second))
    print(f"first   {first.path}\nsecond  {second.path}\n")
    print(in_words(found, most=args.most))
    add_result({"checkpoints": paths, **found})
    write_json(args.out, {"checkpoints": list(map(str, paths)), **found})
    return 0
