"""Timing of calls in turn, and what this machine can reach."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


def interleaved(
    functions: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Times functions in turn and returns medians and spreads, in milliseconds.

    In turn, because machines slow down and speed up over minutes. Every timed call
    follows an untimed one of its own, as a step of training follows a step: caches and
    freed memory are its own then, and threads of another library, which go on spinning
    for a while, are asleep. (After a step of PyTorch, SimpleDLA's at batch 128 took 3.4
    s, of which 2.6 went into having memory from the system again, after its own 1.9.)

    Args:
        functions: Each blocks until its work is done.
        repeats: Timed calls of each.
        warmup: Rounds before, untimed: compilation, caches.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(warmup + repeats):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    timed = {name: values[warmup:] for name, values in times.items()}
    return {
        name: {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
        }
        for name, values in timed.items()
    }


def relative_gap(found: Any, expected: Any) -> float:
    """Returns the largest difference over the largest expected number."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def measure_peak_gflops(dtype: Literal["float32", "bfloat16"] = "float32") -> float:
    """Returns the most that products of two large matrices reach, in GFLOP/s."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: a @ a)
    times = interleaved({"a": lambda: jax.block_until_ready(multiply(a))}, repeats=20)
    return 2e-6 * size**3 / times["a"]["min_ms"]
