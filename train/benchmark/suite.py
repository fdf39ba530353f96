"""The base of the suites of `python -m train benchmark`."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from train.errors import user_input
from train.run.directory import describe_machine


@dataclasses.dataclass(frozen=True)
class BaseSuite:
    """A suite; its fields are its options."""

    out: str | None = None
    """File for the record, as JSON."""

    def cases(self) -> Iterable[Any]:
        """Returns the cases of the suite, such as networks or shapes."""
        raise NotImplementedError

    def measure(self, case: Any) -> dict[str, Any]:
        """Measures a case and returns its row of the record."""
        raise NotImplementedError

    def describe(self, row: dict[str, Any]) -> str:
        """Returns a row as text to print."""
        raise NotImplementedError

    def machine(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns hardware, versions and the command, with the rows of the record."""
        return describe_machine()

    def record(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns what the file of the record holds after these rows."""
        return {"machine": self.machine(rows), "rows": list(rows)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measures the cases in order, prints each row and yields it."""
        for case in self.cases():
            # Not `say`, which starts devices that other processes may be about to use.
            print(f"measuring {case}", file=sys.stderr, flush=True)
            with user_input():
                row = self.measure(case)
            print(self.describe(row), flush=True)
            yield row


@dataclasses.dataclass(frozen=True)
class NetworkSuite(BaseSuite):
    """A suite that measures one network after the other."""

    models: tuple[Literal["resnet18", "vgg16", "simpledla"], ...] = (
        "resnet18",
        "vgg16",
        "simpledla",
    )
    """Networks to measure."""
    batch_size: int = 64
    """Number of images a call."""
    width: float = 1.0
    """Width of the networks."""
    against: Literal["none", "torch"] = "none"
    """torch: the same networks are measured in PyTorch, too, in turn."""

    def cases(self) -> Iterable[str]:
        return self.models

    @property
    def frameworks(self) -> tuple[Literal["jax", "torch"], ...]:
        """The frameworks to measure."""
        return ("jax", "torch") if self.against == "torch" else ("jax",)

    @property
    def both_batches(self) -> tuple[int, ...]:
        """The batch sizes 1 and `batch_size`."""
        return tuple(sorted({1, self.batch_size}))
