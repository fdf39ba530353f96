"""Timing of networks as they are deployed, with BatchNorm folded and not."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np

from inertia_jax import compress, create_model, fold_batch_norm, init_variables
from inertia_jax.calls import Network
from inertia_jax.cost.table import aligned
from inertia_jax.models.create import input_shape
from train.benchmark.inertial import thresholds_at, tiled_model
from train.benchmark.runtimes import RUNTIMES, runtime_call
from train.benchmark.suite import NetworkSuite
from train.benchmark.timing import (
    Calls,
    interleaved,
    jax_call,
    random_images,
    relative_gap,
)
from train.benchmark.tucker import RULES, check_budgets, torch_call

_TUCKER = ("budget 0.25 by 8", "ratio 0.2")
_RATES = (0.1, 0.25)


Runtime = Literal["none", "torch", "onnx", "openvino"]


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Dense, compressed and tiled networks as they are exported, with folded BatchNorm.

    Each is timed at batch 1 and at `batch_size`.
    """

    repeats: int = 9
    """Number of timed calls of each function."""
    against: tuple[Runtime, ...] = ("none",)  # type: ignore[assignment]  # several
    """Other programs that the same networks are measured in, too, in turn: torch, onnx
    (ONNX Runtime) and openvino."""

    def cases(self) -> Iterable[str]:
        for name in self.models:
            check_budgets(create_model(name, width=self.width), _TUCKER)
        return self.models

    def measure(self, case: str) -> dict[str, Any]:
        """Times a network's evaluation dense, compressed and tiled, folded and not.

        Weights are random, and constants of the compiled function, as in an exported
        file. The thresholds of the tiled networks open a given share of the tiles.
        """
        model = create_model(case, width=self.width)
        dense = (model, init_variables(model, jax.random.key(0)))
        networks: dict[str, Network] = {"dense": dense}
        networks |= {key: compress(*dense, **RULES[key]) for key in _TUCKER}
        shape = input_shape(model)
        row: dict[str, Any] = {"model": case, "width": self.width}
        row |= {"times": {}, "gaps": {}}
        for batch_size in self.both_batches:
            images = random_images(batch_size, shape)
            for rate in _RATES:
                tiled = tiled_model(case, self.width, rate)
                thresholds = thresholds_at(tiled, dense[1], images, rate)
                changed = {**dense[1], "thresholds": thresholds}
                networks[f"tiled {rate:g}"] = (tiled, changed)
            calls: Calls = {}
            for key, network in networks.items():
                calls[key] = _call(network, images)
                folded = fold_batch_norm(*network, image_shape=shape)
                calls[f"{key}, folded"] = _call(folded, images)
            if "torch" in self.against:
                for key, fold in (("PyTorch", False), ("PyTorch, folded", True)):
                    calls[key] = torch_call(*dense, images, fold=fold)
            for runtime in ("onnx", "openvino"):
                if runtime not in self.against:
                    continue
                for key in ("dense", *_TUCKER):
                    net, merged = fold_batch_norm(*networks[key], image_shape=shape)
                    call = runtime_call(runtime, net.apply, merged, images)
                    calls[f"{RUNTIMES[runtime]}, {key}, folded"] = call
            row["gaps"][str(batch_size)] = _gaps(calls)
            times = interleaved(calls, repeats=self.repeats)
            for spread in times.values():
                spread["images_per_s"] = 1e3 * batch_size / spread["median_ms"]
            row["times"][str(batch_size)] = times
        return row

    def describe(self, row: dict[str, Any]) -> str:
        lines = []
        for batch_size, times in row["times"].items():
            dense = times["dense"]["median_ms"]
            gaps = row["gaps"][batch_size]
            for name, spread in times.items():
                median = spread["median_ms"]
                line = [f"  batch {batch_size}", name, f"{median:.2f} ms"]
                line += [f"({spread['min_ms']:.2f} to {spread['max_ms']:.2f})"]
                line += [f"{spread['images_per_s']:.0f} images/s"]
                line += [f"{dense / median:.2f}x"]
                line += [f"gap {gaps[name]:.1e}"] if name in gaps else []
                lines.append(line)
        return (
            f"{row['model']}, width {row['width']:g}; the gap is that of folded "
            f"logits, and of others' to JAX's\n{aligned(lines, left=2)}"
        )


def _call(network: Network, images: np.ndarray) -> Callable[[], Any]:
    model, variables = network
    return jax_call(lambda x: model.apply(variables, x), images)


def _gaps(calls: Calls) -> dict[str, float]:
    """Returns each call's largest difference from the unfolded JAX network's logits."""
    gaps = {}
    for name, call in calls.items():
        expected = name.removesuffix(", folded")
        if expected == "PyTorch":
            expected = "dense"
        for runtime in RUNTIMES.values():
            expected = expected.removeprefix(f"{runtime}, ")
        if name != expected:
            gaps[name] = relative_gap(call(), calls[expected]())
    return gaps
