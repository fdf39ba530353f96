"""Estimates that are kept on disk, since a program takes seconds to compile."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterable

import jax

from inertia_jax.atomic import appearing
from inertia_jax.chips.chip import Chip, find_chip
from inertia_jax.chips.compiler import compile_lowered
from inertia_jax.chips.estimate import count_cycles, mark_cycles


def cached_cycles(
    lowered: jax.stages.Lowered, *, chip: Chip | str, marks: Iterable[str] = ()
) -> tuple[int, dict[str, float]]:
    """Returns the cycles that the compiler estimates, of the program and by mark.

    Estimates lie in the user's cache directory (`XDG_CACHE_HOME`) under inertia_jax/
    estimates, by the text of the program, which has all shapes, types and layouts, by
    the marks in it, by the chip, and by the versions of JAX and libtpu.

    Args:
        lowered: What `lower_for` returned.
        chip: The kind of chip, or its name.
        marks: The names that the program's operations are marked with.

    Returns:
        The results of `count_cycles` and `mark_cycles`.

    Raises:
        ValueError: As `compile_lowered`.
    """
    chip = find_chip(chip) if isinstance(chip, str) else chip
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    words = "\n".join([*versions, repr(chip), *marks, lowered.as_text()])
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(home).expanduser() / "inertia_jax" / "estimates"
    file = folder / f"{hashlib.sha256(words.encode()).hexdigest()}.json"
    if not file.exists():
        program = compile_lowered(lowered, chip=chip).as_text() or ""
        found = [count_cycles(program).cycles, mark_cycles(program)]
        with appearing(file) as partial:
            partial.write_text(json.dumps(found))
    cycles, by_mark = json.loads(file.read_text())
    return cycles, by_mark
