"""What devices send each other, read off the text of a compiled program."""

import dataclasses
import math
import re

# Bits of the types of arrays, as the text of a program names them.
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (4, 8, 16, 32, 64)
}
_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf"%([\w.-]+) = (.*?) (?:({_KINDS})(-start|-done)?|[\w-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_WORK = re.compile(r" (?:fusion|convolution|custom-call|dot)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ALGORITHM = re.compile(r'"emitter":"(\w+?)(?:Emitter)?"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation of all devices.

    Attributes:
        kind: The operation, such as "all-reduce".
        num_bytes: The bytes of its results on each device, without padding.
        algorithm: How the devices pass their parts on, "" if the program does not say.
        num_beside: The number of fusions, convolutions and calls that are scheduled
            between its start and its end; None where it is one operation.
        cycles_beside: Their cycles, as far as the compiler estimates them.
    """

    kind: str
    num_bytes: int
    algorithm: str = ""
    num_beside: int | None = None
    cycles_beside: int = 0


def find_collectives(text: str) -> list[Collective]:
    """Returns a compiled program's operations of all devices, in its own order.

    Args:
        text: The program, `compiled.as_text()`. Those in the body of a loop are counted
            once.
    """
    found: list[Collective] = []
    started: dict[str, int] = {}
    for line in text.splitlines():
        instruction = _INSTRUCTION.search(line)
        if instruction is None:
            continue
        name, shape, kind, part = instruction.groups()
        if kind is None:
            cycles = sum(map(int, _CYCLES.findall(line)))
            for place in started.values() if _WORK.search(line) else ():
                one = found[place]
                found[place] = dataclasses.replace(
                    one,
                    num_beside=(one.num_beside or 0) + 1,
                    cycles_beside=one.cycles_beside + cycles,
                )
        elif part == "-done":
            # The start's own result may hold its operands, too.
            place = started.pop(re.findall(r"%([\w.-]+)", line)[1])
            done = dataclasses.replace(found[place], num_bytes=_num_bytes(shape))
            found[place] = done
        else:
            algorithm = _ALGORITHM.search(line)
            is_started = part == "-start"
            if is_started:
                started[name] = len(found)
            found.append(
                Collective(
                    kind,
                    _num_bytes(shape),
                    algorithm[1] if algorithm else "",
                    num_beside=0 if is_started else None,
                )
            )
    return found


def _num_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple."""
    bits = sum(
        _BITS[kind] * math.prod(map(int, filter(None, sizes.split(","))))
        for kind, sizes in _ARRAY.findall(shape)
    )
    return bits // 8
