"""Timing of a sweep's networks beside each other: training steps, and evaluation."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from inertia_jax.cost.table import aligned
from train.benchmark.suite import BaseSuite
from train.benchmark.timing import Calls, interleaved
from train.config import Config, SourceOption
from train.data import ImageSet, load_configured
from train.errors import UsageError
from train.experiments.sweep import load_sweep, with_source
from train.fit.trainer import Trainer

_WHAT = ("train", "evaluate")


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """A sweep's networks beside each other: training steps, and evaluation."""

    sweep: str = "configs/sweeps/mnist_inertial.py"
    """File of the sweep."""
    data: SourceOption = None
    """Source of the data; None: the configurations' own."""
    batch_size: int = 64
    """Number of images of an evaluation."""
    steps: int = 200
    """Number of training steps before the timed calls, at most those of an epoch."""
    repeats: int = 9
    """Number of timed calls of each function."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times a call of training, and an evaluation of one batch, of every network.

        All calls take turns, on one device, after `steps` steps of each network. By
        then thresholds have settled, and gates open as often as in training.

        Yields:
            A row for each configuration: its `name`; the milliseconds of `train`, a
            step of the configuration's `batch_size`, and of `evaluate`, a pass of
            `eval_batch_size` images; and the `gate_rates` on the test images.

        Raises:
            UsageError: There are fewer test images than `batch_size`, or an epoch has
                fewer steps than `steps`.
        """
        load = functools.cache(load_configured)
        calls: Calls = {}
        rows: list[dict[str, Any]] = []
        for config in load_sweep(pathlib.Path(self.sweep)).configs:
            config = with_source(config, self.data)
            pair, gate_rates = self._calls(config, load(config.data))
            calls |= {f"{what} {config.name}": call for what, call in pair.items()}
            row = {"name": config.name, "batch_size": config.batch_size}
            row |= {"eval_batch_size": self.batch_size, "gate_rates": gate_rates}
            rows.append(row)
        times = interleaved(calls, repeats=self.repeats)
        for row in rows:
            row |= {what: times[f"{what} {row['name']}"] for what in _WHAT}
        print(format_sweep(rows))
        yield from rows

    def _calls(self, config: Config, data: ImageSet) -> tuple[Calls, dict[str, float]]:
        """Returns a network's calls, and its gate rates after the first steps."""
        if len(data.test) < self.batch_size:
            raise UsageError(
                f"`batch_size` (={self.batch_size}) must be at most {len(data.test)}, "
                f"the test images of {data.name}."
            )
        config = dataclasses.replace(config, steps_per_call=1)
        trainer = Trainer(config, data, jax.devices()[:1])
        if self.steps > trainer.steps_per_epoch:
            raise UsageError(
                f"`steps` (={self.steps}) must be at most {trainer.steps_per_epoch}, "
                f"an epoch of {config.name}."
            )
        state = trainer.init_state()
        for inputs in itertools.islice(trainer.inputs(0, 0), self.steps):
            state, _ = trainer.train_call(state, inputs)
        gate_rates = dict(trainer.evaluate(state).gate_rates)
        # The next step takes over the state's arrays, so that a copy is evaluated.
        variables = jax.tree.map(jnp.copy, state.result)
        stored = jnp.asarray(data.test.images[: self.batch_size])
        images = trainer.augmentation.for_evaluation(stored)
        evaluate = functools.partial(jax.jit(trainer.model.apply), variables, images)

        def train() -> Any:
            nonlocal state
            state, totals = trainer.train_call(state, inputs)
            return state, totals

        return {"train": train, "evaluate": evaluate}, gate_rates


def format_sweep(rows: list[dict[str, Any]]) -> str:
    """Returns the medians, also relative to a network without gates, as a table."""
    dense = next((row for row in rows if not row["gate_rates"]), rows[0])
    of_dense = f"of {dense['name']}"
    lines = [["run", "step, ms", of_dense, "forward, ms", "of the same"]]
    for row in rows:
        line = [row["name"]]
        for what in _WHAT:
            median = row[what]["median_ms"]
            share = median / dense[what]["median_ms"]
            line += [f"{median:.1f}", f"{share:.2f}"]
        lines.append(line)
    return aligned(lines)
