"""Timing of a sweep's networks beside each other: training steps, and evaluation."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from inertia_jax.cost.table import aligned
from train.benchmark.suite import BaseSuite, load_images, with_source
from train.benchmark.timing import interleaved
from train.config import Config
from train.data import ImageSet
from train.errors import UsageError
from train.experiments.sweep import load_sweep
from train.fit.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """A sweep's networks beside each other: training steps, and evaluation."""

    sweep: str = "configs/sweeps/mnist_inertial.py"
    """File of the sweep."""
    data: str | None = None
    """Source of the data; None: the configurations' own."""
    batch_size: int = 64
    """Images of an evaluation."""
    steps: int = 200
    """Steps of training before anything is timed, at most an epoch's."""
    repeats: int = 9
    """Timed calls of each."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times every network of the sweep, in turn."""
        sweep = load_sweep(pathlib.Path(self.sweep))
        rows = bench_sweep(
            [with_source(config, self.data) for config in sweep.configs],
            batch_size=self.batch_size,
            steps=self.steps,
            repeats=self.repeats,
        )
        print(format_sweep(rows))
        yield from rows


def bench_sweep(
    configs: Sequence[Config], *, batch_size: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Times a call of training, and an evaluation of one batch, of every network.

    All calls take turns, on one device, after `steps` steps of each network: by then
    thresholds have settled, so that gates open as often as they do in training.

    Args:
        configs: The sweep's configurations; those that share data load them once.
        batch_size: Images of an evaluation.
        steps: Steps before anything is timed.
        repeats: Timed calls of each.

    Returns:
        A row for each configuration: its `name`; the milliseconds of `train`, a step of
        `batch_size` images, and of `evaluate`, a pass of `eval_batch_size`; and the
        `gate_rates` on the test images.

    Raises:
        UsageError: There are fewer test images than `batch_size`, or an epoch has fewer
            steps than `steps`.
    """
    load = functools.cache(load_images)
    parts = [
        (config, *_timed_calls(config, load(config.data), batch_size, steps))
        for config in configs
    ]
    calls = {
        f"{what} {config.name}": call
        for config, functions, _ in parts
        for what, call in functions.items()
    }
    times = interleaved(calls, repeats=repeats)
    return [
        {
            "name": config.name,
            "batch_size": config.batch_size,
            "eval_batch_size": batch_size,
            **{what: times[f"{what} {config.name}"] for what in functions},
            "gate_rates": gate_rates,
        }
        for config, functions, gate_rates in parts
    ]


def _timed_calls(
    config: Config, data: ImageSet, batch_size: int, steps: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    if len(data.test) < batch_size:
        raise UsageError(
            f"`batch_size` (={batch_size}) must be at most {len(data.test)}, the test "
            f"images of {data.name}."
        )
    trainer = Trainer(
        dataclasses.replace(config, steps_per_call=1), data, jax.devices()[:1]
    )
    if steps > trainer.steps_per_epoch:
        raise UsageError(
            f"`steps` (={steps}) must be at most {trainer.steps_per_epoch}, an epoch "
            f"of {config.name}."
        )
    state = trainer.init_state()
    ready = list(itertools.islice(trainer.inputs(0, 0), steps))
    for inputs in ready:
        state, _ = trainer.train_call(state, inputs)
    held = [state]

    def train() -> None:
        held[0], totals = trainer.train_call(held[0], ready[-1])
        jax.block_until_ready((held[0], totals))

    gate_rates = dict(trainer.evaluate(held[0]).gate_rates)
    # The variables are copied: the next step takes the state's own arrays.
    variables = jax.tree.map(jnp.copy, held[0].result)
    stored = jnp.asarray(data.test.images[:batch_size])
    images = trainer.augmentation.for_evaluation(stored)
    predict = jax.jit(lambda variables, images: trainer.model.apply(variables, images))

    def evaluate() -> None:
        jax.block_until_ready(predict(variables, images))

    return {"train": train, "evaluate": evaluate}, gate_rates


def format_sweep(rows: list[dict[str, Any]]) -> str:
    """Returns the medians, beside those of a network without gates, as a table."""
    dense = next((row for row in rows if not row["gate_rates"]), rows[0])
    of_dense = f"of {dense['name']}"
    lines = [["run", "step, ms", of_dense, "forward, ms", "of the same"]]
    for row in rows:
        line = [row["name"]]
        for what in ("train", "evaluate"):
            median = row[what]["median_ms"]
            share = median / dense[what]["median_ms"]
            line += [f"{median:.1f}", f"{share:.2f}"]
        lines.append(line)
    return aligned(lines)
