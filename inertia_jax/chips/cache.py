"""Estimates that are kept on disk, since a program takes seconds to compile."""

import hashlib
import importlib.metadata
import json
import os
import pathlib

import jax

from inertia_jax.atomic import appearing
from inertia_jax.chips.chip import Chip, find_chip
from inertia_jax.chips.compiler import compile_lowered
from inertia_jax.chips.estimate import Estimate, estimate


def cached_estimate(lowered: jax.stages.Lowered, *, chip: Chip | str) -> Estimate:
    """Returns the compiler's estimate of what `lower_for` returned.

    Estimates lie in the user's cache directory (`XDG_CACHE_HOME`) under inertia_jax/
    estimates, by the text of the program, which has all shapes, types and layouts, by
    the chip, and by the versions of JAX and libtpu.

    Raises:
        ValueError: As `compile_lowered`.
    """
    chip = find_chip(chip) if isinstance(chip, str) else chip
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    words = "\n".join([*versions, repr(chip), lowered.as_text()])
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(home).expanduser() / "inertia_jax" / "estimates"
    file = folder / f"{hashlib.sha256(words.encode()).hexdigest()}.json"
    if file.exists():
        return Estimate(**json.loads(file.read_text()))
    found = estimate(compile_lowered(lowered, chip=chip))
    with appearing(file) as partial:
        partial.write_text(json.dumps(found._asdict()))
    return found
