"""The compiler's estimate of what a compiled program costs on its chip."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

# Operations that take no time of their own: names and places of what others make.
_FREE = frozenset(
    (
        "bitcast",
        "constant",
        "get-tuple-element",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    )
)
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# The type before the name of the operation has no word in small letters before a "(".
_OPERATION = re.compile(r"  (?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(
    r"(?:body|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_CONTROL = ("while", "conditional", "call")


class Estimate(NamedTuple):
    """What the compiler expects a program to cost on each chip; nothing is measured.

    Attributes:
        flops: Floating-point operations, two for each multiply-accumulate.
        bytes_accessed: Bytes that operations read and write, wherever they lie.
        cycles: Cycles, summed over the operations that the program runs one after
            another. The body of a loop is counted once, and all branches of a
            conditional are.
        num_operations: The number of operations that are counted so.
        num_uncosted: The number of those that the compiler gives no cycles, such as
            copies in the background and exchanges between chips. They add none.
        memory_bytes: The memory of arguments, results and what lies between them.
    """

    flops: float
    bytes_accessed: float
    cycles: int
    num_operations: int
    num_uncosted: int
    memory_bytes: int


def estimate(compiled: jax.stages.Compiled) -> Estimate:
    """Returns the compiler's estimate of a program that `compile_for` returned.

    Raises:
        ValueError: No operation of the program has an estimate, as in programs for
            another platform than TPU.
    """
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    counted = count_cycles(compiled.as_text() or "")
    return Estimate(
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
        cycles=counted.cycles,
        num_operations=counted.num_operations,
        num_uncosted=counted.num_uncosted,
        memory_bytes=(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        ),
    )


class Count(NamedTuple):
    """The sum of a program's cycles; see `Estimate`."""

    cycles: int
    num_operations: int
    num_uncosted: int


def count_cycles(text: str) -> Count:
    """Returns the sum of the cycles that a compiled program has at its operations.

    Args:
        text: The program, as `Compiled.as_text` writes it.

    Raises:
        ValueError: No operation has an estimate of its cycles.
    """
    computations, entry = _computations(text)
    if not _CYCLES.search(text):
        raise ValueError(
            "the compiled program must have cycles that its compiler estimates, as "
            "those for TPUs have; it has none."
        )

    def parts(name: str) -> Iterator[int | None]:
        for operation, line in computations[name]:
            if operation in _CONTROL:
                for called in _called(line):
                    yield from parts(called)
            elif operation not in _FREE and not operation.endswith("-done"):
                found = _CYCLES.search(line)
                yield int(found[1]) if found else None

    every = list(parts(entry))
    costed = [cycles for cycles in every if cycles is not None]
    return Count(sum(costed), len(every), len(every) - len(costed))


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Returns the operations of each computation with their lines, and the entry."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and (operation := _OPERATION.match(line)):
            computations[name].append((operation[1], line))
    return computations, entry


def _called(line: str) -> Iterator[str]:
    """Yields the computations that a loop, a conditional or a call runs."""
    for one, several in _CALLED.findall(line):
        yield from [one] if one else re.findall(r"[\w.-]+", several)
