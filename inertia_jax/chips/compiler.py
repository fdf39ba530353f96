"""Compiles functions for accelerators that are not there, by their own compiler."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from inertia_jax.chips.chip import Chip, find_chip

# What libtpu takes from the environment: the machine that it would look for, and that
# another process may have it loaded, too.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def tell_libtpu() -> None:
    """Tells libtpu that this machine has no TPU, where JAX sees none.

    Otherwise it complains in several lines when JAX computes for the first time, and
    refuses to serve two processes at once.
    """
    # JAX sets this when it is imported where it sees no TPU.
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        for variable, value in _NO_TPU.items():
            os.environ.setdefault(variable, value)


def topology(chip: Chip | str, num_chips: int = 1) -> topologies.TopologyDescription:
    """Returns a machine to compile for, whose `devices` cannot compute.

    Args:
        chip: The kind of chip, or its name.
        num_chips: The number of chips: 1, 4, 8, 16 and so on.

    Raises:
        ImportError: libtpu, which has the compiler, is not installed.
        RuntimeError: libtpu cannot be loaded, as where another process has the TPU of
            this machine.
        ValueError: An unknown name, a number of chips that no machine has, or a
            topology that the installed libtpu does not know.
    """
    chip = find_chip(chip) if isinstance(chip, str) else chip
    name = chip.topology_name(num_chips)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {chip.name} needs libtpu: pip install '.[tpu]' in the "
            f"checkout."
        )
    tell_libtpu()
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chips_per_host_bounds=[*chip.host, 1, 1][:3],
        )
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(
            f"the topology of `device` (={chip.name!r}), {name}, must be one that the "
            f"installed libtpu knows. {error}"
        ) from error
    return topologies.TopologyDescription(found.devices[:num_chips])


def compile_for(
    function: Callable[..., Any], *shapes: Any, chip: Chip | str
) -> jax.stages.Compiled:
    """Compiles a function for an accelerator that need not be there.

    The result cannot be called. `estimate` reads what the compiler says of it. The
    arguments are those of `lower_for`.

    Raises:
        ImportError: libtpu, which has the compiler, is not installed.
        ValueError: An unknown chip, or a program that does not fit into its memory; the
            message says by how much.
    """
    return compile_lowered(lower_for(function, *shapes, chip=chip), chip=chip)


def lower_for(
    function: Callable[..., Any], *shapes: Any, chip: Chip | str
) -> jax.stages.Lowered:
    """Lowers a function for an accelerator that need not be there.

    Args:
        function: The function, or what `jax.jit` has made of it.
        shapes: Its arguments: trees of `jax.ShapeDtypeStruct`, or of arrays, of which
            only shapes and types count. A `jax.ShapeDtypeStruct` without a sharding
            lies on one chip; for several, all have one over `topology(...).devices`.
        chip: The kind of chip, or its name.

    Raises:
        ImportError: libtpu, which has the compiler, is not installed.
        ValueError: An unknown chip.
    """
    one = jax.sharding.SingleDeviceSharding(topology(chip).devices[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or one)

    if not hasattr(function, "trace"):
        function = jax.jit(function)
    return function.trace(*jax.tree.map(placed, shapes)).lower()


def compile_lowered(
    lowered: jax.stages.Lowered, *, chip: Chip | str
) -> jax.stages.Compiled:
    """Compiles what was lowered for devices of `topology`, as `compile_for` does.

    Raises:
        ValueError: An unknown chip, or a program that does not fit into its memory; the
            message says by how much.
    """
    chip = find_chip(chip) if isinstance(chip, str) else chip
    try:
        with _uncached():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"the program must fit into the memory of `device` (={chip.name!r})"
            f"{_excess(str(error))}. {error}"
        ) from error


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of JAX's cache, which could not read them without a TPU."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _excess(text: str) -> str:
    """Returns by how much a program does not fit, as its compiler says, or nothing."""
    sizes = [
        float(number) * _UNITS[unit]
        for number, unit in re.findall(r"([\d.]+)([KMGT])\b", text)
    ]
    if len(sizes) < 2:
        return ""
    return f", which it exceeds by {(sizes[0] - sizes[1]) / 2**30:.2f} GiB"
