"""`python -m train quickstart`: train and evaluate a small network, in minutes."""

import pathlib
import time
from collections.abc import Sequence

from train.config_file import load_config
from train.evaluate.checkpoint import EvaluationSettings, evaluate_network
from train.fit.loop import exit_code, fit, result_to_json, summary
from train.networks import read_network
from train.options.quickstart import parse
from train.result import add_result
from train.run.checkpoints import find_checkpoint


def run(argv: Sequence[str]) -> int:
    """Trains, evaluates from the checkpoint and prints where things lie."""
    args = parse(argv)
    start = time.monotonic()
    workdir = pathlib.Path(args.workdir).expanduser()
    result = fit(load_config("quickstart"), workdir=workdir, resume=True)
    add_result(result_to_json(result))
    if result.evaluation is None:
        print(f"stopped and saved at step {result.step}; the same command goes on.")
        return exit_code(result)
    best = read_network(find_checkpoint(workdir))
    evaluation = evaluate_network(best, EvaluationSettings())
    print(f"\nthe best checkpoint, {best.path.name}, evaluated again:\n{evaluation}\n")
    print(summary(result))
    print(f"took         {time.monotonic() - start:.0f} s")
    return 0
