"""The accuracy of a network before and after every stage of its compression."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from inertia_jax.calls import Network, are_equal
from train.evaluate.checkpoint import evaluator_for
from train.evaluate.evaluation import Evaluation, in_points, paired_difference
from train.evaluate.settings import EvaluationSettings
from train.networks import NetworkDescription


def stage_evaluator(
    *, description: NetworkDescription, sources: Sequence[str], cache_dir: str | None
) -> Callable[[Mapping[str, Network]], dict[str, list[Evaluation]]]:
    """Returns a function that evaluates networks, by stage, on every test set.

    Equal models of one call are compiled once. Nothing stays on the devices.

    Args:
        description: The description of the dense network, which holds for all of them.
        sources: The sources of the test sets.
        cache_dir: The directory in which decoded sets are kept.
    """
    # As the training images are that the networks are made with.
    settings = EvaluationSettings(cache_dir=cache_dir, resize=True)

    def evaluate(stages: Mapping[str, Network]) -> dict[str, list[Evaluation]]:
        # Not by hash: a field of the user's network may be a list.
        known: list[tuple[str, nn.Module, Any]] = []

        def evaluator(source: str, model: nn.Module) -> Any:
            for its_source, its_model, found in known:
                if its_source == source and are_equal(its_model, model):
                    return found
            network = dataclasses.replace(description, model=model)
            known.append((source, model, evaluator_for(network, source, settings)))
            return known[-1][-1]

        return {
            name: [evaluator(source, model)(variables) for source in sources]
            for name, (model, variables) in stages.items()
        }

    return evaluate


def compare_stages(
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


def in_words(test: Mapping[str, Any]) -> str:
    """Returns an entry of `compare_stages` as a line."""
    parts = [f"{test['data']}: top-1 {test['top1_before']:.2%} before"]
    parts += [
        f"{name} {stage['top1']:.2%} "
        f"({in_points(stage['difference'], stage['margin_95'])})"
        for name, stage in test["stages"].items()
    ]
    return (
        f"{', '.join(parts)}; points, 95% interval, paired, "
        f"{test['num_examples']:,} images"
    )
