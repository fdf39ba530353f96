"""The compiler's estimate of what a compiled program costs on its chip."""

import contextlib
import re
from collections.abc import Iterable, Iterator
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
_JOINED = re.compile(r"calls=%?([\w.-]+)")
_PRODUCTS = ("convolution", "dot")
_MARK = re.compile(r"mark<([^>]*)>")

# The name of an operation and its line; the operations of each computation, and the
# name of the one where a program begins.
_Operation = tuple[str, str]
_Program = tuple[dict[str, list[_Operation]], str]


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
    if not _CYCLES.search(text):
        raise ValueError(
            "the compiled program must have cycles that its compiler estimates, as "
            "those for TPUs have; it has none."
        )
    every = [_cycles(line) for _, line in _run(_computations(text))]
    costed = [cycles for cycles in every if cycles is not None]
    return Count(sum(costed), len(every), len(every) - len(costed))


def mark(name: str) -> contextlib.AbstractContextManager[None]:
    """Marks all operations that are traced inside a `with` block; see `mark_cycles`."""
    return jax.named_scope(f"mark<{name}>")


def mark_cycles(text: str) -> dict[str, float]:
    """Returns the sum of the cycles of the operations that have each mark.

    The compiler joins operations. The cycles of what it has joined belong to the marks
    of the convolutions and products in it, in equal parts, or to all marks in it where
    it has none of these.

    Args:
        text: The program, as `Compiled.as_text` writes it.
    """
    program = _computations(text)
    found: dict[str, float] = {}
    for operation, line in _run(program):
        inside = list(_inside(program[0], operation, line))
        marks = _marks(line for name, line in inside if name in _PRODUCTS)
        marks = marks or _marks(line for _, line in inside)
        for name in marks:
            found[name] = found.get(name, 0.0) + (_cycles(line) or 0) / len(marks)
    return found


def _cycles(line: str) -> int | None:
    """Returns the cycles that the compiler estimates for an operation, if it does."""
    found = _CYCLES.search(line)
    return int(found[1]) if found else None


def _marks(lines: Iterable[str]) -> set[str]:
    """Returns the marks of operations: of each, the outermost."""
    return {found[1] for line in lines if (found := _MARK.search(line))}


def _run(program: _Program) -> Iterator[_Operation]:
    """Yields the operations that a program runs one after another."""
    computations, entry = program

    def parts(name: str) -> Iterator[_Operation]:
        for operation, line in computations[name]:
            if operation in _CONTROL:
                for called in _called(line):
                    yield from parts(called)
            elif operation not in _FREE and not operation.endswith("-done"):
                yield operation, line

    return parts(entry)


def _inside(
    computations: dict[str, list[_Operation]], operation: str, line: str
) -> Iterator[_Operation]:
    """Yields an operation, and those that the compiler has joined to it."""
    yield operation, line
    for name in _JOINED.findall(line):
        for each in computations.get(name, ()):
            yield from _inside(computations, *each)


def _computations(text: str) -> _Program:
    """Returns the operations of each computation with their lines, and the entry."""
    computations: dict[str, list[_Operation]] = {}
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
