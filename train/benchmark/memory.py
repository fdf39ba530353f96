"""Peak memory of training, in JAX and in PyTorch, each in a process of its own."""

import concurrent.futures
import dataclasses
import multiprocessing
import resource
from typing import Any, Literal

import jax

from train.benchmark.steps import make_functions
from train.benchmark.suite import NetworkSuite
from train.machine.host_memory import give_back_after_compiling, tunables_for_children

_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Peak memory of a process that trains a network: of the device where it counts."""

    def measure(self, case: str) -> dict[str, Any]:
        """Measures the peak memory of a process that trains, in MB.

        It is that of the device where the framework counts it, as on GPUs, and else the
        resident size of the process.
        """
        row: dict[str, Any] = {"model": case}
        row |= {"batch_size": self.batch_size, "width": self.width}
        for kind in self.frameworks:
            # A forked process would count this process's memory as its own.
            context = multiprocessing.get_context("spawn")
            with (
                tunables_for_children(),  # as a run has it
                concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
            ):
                arguments = (kind, case, self.batch_size, self.width)
                row[kind] = pool.submit(_peak_mb, *arguments).result()
        return row

    def describe(self, row: dict[str, Any]) -> str:
        peaks = [f"{kind} {row[kind]:,.0f} MB" for kind in self.frameworks]
        return f"{row['model']:<11} batch {row['batch_size']}  {', '.join(peaks)}"


def _peak_mb(
    kind: Literal["jax", "torch"], name: str, batch_size: int, width: float
) -> float:
    give_back_after_compiling()
    train = make_functions(kind, name, batch_size, width, "float32")["train"]
    for _ in range(_STEPS):
        jax.block_until_ready(train())
    if kind == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e6
    elif counted := jax.devices()[0].memory_stats():
        return counted["peak_bytes_in_use"] / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
