"""Timing of calls in turn, and what this machine can reach."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Calls = dict[str, Callable[[], Any]]


def interleaved(functions: Calls, *, repeats: int) -> dict[str, dict[str, float]]:
    """Times functions in turn and returns medians and spreads, in milliseconds.

    Every timed call follows an untimed call of the same function, as a step of training
    follows a step: it finds its own caches and freed memory, and the threads of another
    library, which go on spinning for a while, are asleep. (SimpleDLA's step at batch
    128 took 1.9 s after one of its own, and 3.4 s after a step of PyTorch: 2.6 s of
    these were spent on getting memory from the system again.)

    Args:
        functions: The functions; the arrays that they return are waited for.
        repeats: The number of timed calls of each.
    """

    def before(name: str) -> None:
        jax.block_until_ready(functions[name]())

    times = times_in_turn(functions, repeats=repeats, before=before)
    return {name: spread_of(values) for name, values in times.items()}


def times_in_turn(
    functions: Calls,
    *,
    repeats: int,
    before: Callable[[str], Any] = lambda name: None,
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Returns the milliseconds of each call, after a round that is not timed.

    Functions take turns, because machines slow down and speed up over minutes; every
    second round goes in the opposite order.

    Args:
        functions: The functions; the arrays that they return are waited for.
        repeats: The number of timed calls of each.
        before: A function that is called before each call, with the function's name.
        prepare: A function that is called before each round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(1 + repeats):
        prepare()
        for name in order:
            before(name)
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append(1e3 * (time.perf_counter() - start))
        order.reverse()
    return {name: values[1:] for name, values in times.items()}


def spread_of(times: list[float]) -> dict[str, float]:
    """Returns the median, the minimum and the maximum of times in milliseconds."""
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
    }


def median_with_interval(values: list[float]) -> dict[str, float]:
    """Returns a median and its 95% interval, for independent values.

    Raises:
        ValueError: There are fewer than six values, which have no such interval.
    """
    if len(values) < 6:
        raise ValueError(f"`values` (={len(values)}) must be at least six.")
    # This import takes a second, and only one suite needs it.
    from scipy.stats import quantile_test

    test = quantile_test(values, q=np.median(values), p=0.5)
    interval = test.confidence_interval(confidence_level=0.95)
    low, high = float(interval.low), float(interval.high)
    return {"median": statistics.median(values), "low_95": low, "high_95": high}


def relative_gap(found: Any, expected: Any) -> float:
    """Returns the largest difference over the largest expected number."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def jax_call(function: Callable[[Any], Any], images: np.ndarray) -> Callable[[], Any]:
    """Returns a compiled function's call on images that lie on the device."""
    compiled, on_device = jax.jit(function), jax.device_put(images)
    return lambda: compiled(on_device)


@functools.cache
def peak_gflops(dtype: Literal["float32", "bfloat16"]) -> float:
    """Measures and prints what products of two large matrices reach, in GFLOP/s."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: a @ a)
    times = interleaved({"a": lambda: multiply(a)}, repeats=20)
    peak = 2e-6 * size**3 / times["a"]["min_ms"]
    print(f"product of two large matrices: {peak:,.0f} GFLOP/s", flush=True)
    return peak


def random_images(batch_size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns normally distributed images in float32, the same in every call."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch_size, *shape), np.float32)
