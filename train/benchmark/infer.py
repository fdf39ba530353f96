"""Timing of networks as they are deployed, with BatchNorm as it is and folded."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from inertia_jax import compress, create_model, fold_batch_norm, init_variables
from inertia_jax.cost.table import aligned
from inertia_jax.models.create import input_shape
from train.benchmark.inertial import thresholds_at, tiled_model
from train.benchmark.suite import NetworkSuite
from train.benchmark.timing import interleaved, relative_gap
from train.benchmark.tucker import RULES, torch_call

_TUCKER = ("budget 0.25 by 8", "ratio 0.2")
_RATES = (0.1, 0.25)


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Dense, compressed and tiled networks as they are exported, BatchNorm folded.

    Each is timed at batch 1 and at `batch_size`.
    """

    repeats: int = 9
    """Timed calls of each."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times each network as it is and folded."""
        options = {"batch_sizes": self.both_batches, "repeats": self.repeats}
        return self.each_model(bench_infer, format_infer, **options)


def bench_infer(
    name: str,
    *,
    batch_sizes: tuple[int, ...],
    width: float,
    repeats: int,
    against_torch: bool,
) -> dict[str, Any]:
    """Times a network's evaluation dense, compressed and tiled, folded and not.

    Weights are random, and constants of the compiled function, as in an exported file.
    Thresholds of the tiled networks open the given share of each batch's tiles.
    """
    model = create_model(name, width=width)
    dense = (model, init_variables(model, jax.random.key(0)))
    compressed = {key: compress(*dense, **RULES[key]) for key in _TUCKER}
    shape = input_shape(model)
    row: dict[str, Any] = {"model": name, "width": width, "times": {}, "gaps": {}}
    for batch_size in batch_sizes:
        images = np.random.default_rng(0).standard_normal((batch_size, *shape))
        images = images.astype(np.float32)
        networks: dict[str, Any] = {"dense": dense, **compressed}
        for rate in _RATES:
            thresholds = thresholds_at(name, width, dense[1], images, rate)
            tiled = tiled_model(name, width, rate)
            networks[f"tiled {rate:g}"] = (
                tiled,
                {**dense[1], "thresholds": thresholds},
            )
        calls: dict[str, Callable[[], Any]] = {}
        for key, network in networks.items():
            calls[key] = _call(network, images)
            folded = fold_batch_norm(*network, image_shape=shape)
            calls[f"{key}, folded"] = _call(folded, images)
        if against_torch:
            for key, fold in (("PyTorch", False), ("PyTorch, folded", True)):
                calls[key] = torch_call(*dense, images, fold=fold)
        row["gaps"][str(batch_size)] = _gaps(calls)
        times = interleaved(calls, repeats=repeats)
        for found in times.values():
            found["images_per_s"] = 1e3 * batch_size / found["median_ms"]
        row["times"][str(batch_size)] = times
    return row


def format_infer(row: dict[str, Any]) -> str:
    """Returns a row's medians, beside the dense network's with BatchNorm, as lines."""
    title = f"{row['model']}, width {row['width']:g}; the gap is that of folded logits"
    lines = []
    for batch_size, times in row["times"].items():
        dense = times["dense"]["median_ms"]
        gaps = row["gaps"][batch_size]
        for name, found in times.items():
            median = found["median_ms"]
            line = [f"  batch {batch_size}", name, f"{median:.2f} ms"]
            line += [f"({found['min_ms']:.2f} to {found['max_ms']:.2f})"]
            line += [f"{found['images_per_s']:.0f} images/s", f"{dense / median:.2f}x"]
            line += [f"gap {gaps[name]:.1e}"] if name in gaps else []
            lines.append(line)
    return f"{title}, and of PyTorch's to JAX's\n{aligned(lines, left=2)}"


def _call(network: tuple[Any, Any], images: np.ndarray) -> Callable[[], Any]:
    model, variables = network
    apply = jax.jit(lambda x: model.apply(variables, x))
    on_device = jax.device_put(images)
    return lambda: jax.block_until_ready(apply(on_device))


def _gaps(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns how far logits are from the network's own, relative to the largest."""
    gaps = {}
    for name, call in calls.items():
        expected = name.removesuffix(", folded")
        if expected == "PyTorch":
            expected = "dense"
        if name != expected:
            gaps[name] = relative_gap(call(), calls[expected]())
    return gaps
