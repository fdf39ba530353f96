"""Peak memory of training, in JAX and in PyTorch, each in a process of its own."""

import concurrent.futures
import dataclasses
import multiprocessing
import resource
from collections.abc import Iterator
from typing import Any, Literal

from train.benchmark.steps import make_functions
from train.benchmark.suite import NetworkSuite
from train.machine.host_memory import give_back_after_compiling

_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Peak memory of a process that trains a network."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Trains each network in a process of its own."""
        return self.each_model(bench_memory, format_memory, batch_size=self.batch_size)


def bench_memory(
    name: str, *, batch_size: int, width: float, against_torch: bool
) -> dict[str, Any]:
    """Returns the peak resident size of a process that trains, in MB.

    Args:
        name: The network's name.
        batch_size: Images a step.
        width: The network's width.
        against_torch: Whether PyTorch is measured, too.
    """
    kinds: tuple[Literal["jax", "torch"], ...] = ("jax",)
    if against_torch:
        kinds = ("jax", "torch")
    row: dict[str, Any] = {"model": name, "batch_size": batch_size, "width": width}
    for kind in kinds:
        # The process is spawned, not forked: what this one holds must not count.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            row[kind] = pool.submit(_peak_mb, kind, name, batch_size, width).result()
    return row


def format_memory(row: dict[str, Any]) -> str:
    """Returns a row's peaks as a line."""
    found = [f"{kind} {row[kind]:,.0f} MB" for kind in ("jax", "torch") if kind in row]
    return f"{row['model']:<11} batch {row['batch_size']}  {', '.join(found)}"


def _peak_mb(
    kind: Literal["jax", "torch"], name: str, batch_size: int, width: float
) -> float:
    give_back_after_compiling()
    functions = make_functions(
        name, batch_size=batch_size, width=width, kinds=(kind,), dtype="float32"
    )
    for _ in range(_STEPS):
        functions["train"][kind]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
