"""The time of networks on this machine, and the cycles on a chip that is not there."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inertia_jax import fold_batch_norm
from inertia_jax.chips.chip import find_chip
from inertia_jax.compression.chip_times import chip_times
from train.benchmark.timing import interleaved, jax_call, random_images
from train.machine.processes import say
from train.networks import TrainedNetwork
from train.report.subjects import Subject
from train.run.directory import describe_machine

BATCH_SIZES = (1, 64)
_REPEATS = 9

# What must be the same for times to be compared.
_MACHINE = ("backend", "device", "cpu", "num_cpus", "versions", "environment")


def measure_latency(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Times networks in turn, as `export` writes them, with BatchNorm folded.

    Returns:
        `machine`, and `networks`: by the hash of the checkpoint and the number of
        images a call, the median, the least and the greatest time in milliseconds.
    """
    folded = {s.sha256: _folded(s.network) for s in subjects if s.network}
    networks: dict[str, dict[str, Any]] = {sha256: {} for sha256 in folded}
    for batch_size in BATCH_SIZES:
        say(f"timing {len(networks)} networks in turn, batch {batch_size}")
        calls = {
            sha256: jax_call(apply, random_images(batch_size, shape))
            for sha256, (apply, shape) in folded.items()
        }
        for sha256, spread in interleaved(calls, repeats=_REPEATS).items():
            networks[sha256][str(batch_size)] = spread
    return {"machine": _this_machine(), "networks": networks}


def kept_latency(record: Any, subjects: Sequence[Subject]) -> dict[str, Any] | None:
    """Returns the times of a record, if they hold for these networks, here and now.

    Times of other networks are left out. None means that one of these is missing:
    networks are only compared in times that were measured in turn.
    """
    latency = record.get("latency") if isinstance(record, Mapping) else None
    if not isinstance(latency, Mapping) or latency.get("machine") != _this_machine():
        return None
    known = latency.get("networks")
    wanted = {subject.sha256 for subject in subjects if subject.network is not None}
    if not isinstance(known, Mapping) or not wanted or not wanted <= known.keys():
        return None
    return {**latency, "networks": {sha256: known[sha256] for sha256 in wanted}}


def estimate_cycles(network: TrainedNetwork, device: str, *, batch_size: int) -> int:
    """Returns the cycles of a call in bfloat16, as the compiler of a chip has them.

    Raises:
        ValueError: No chip has this name, or the network does not fit into its memory.
        ImportError: libtpu, which has the compiler, is not installed.
    """
    times = chip_times(
        (network.model, network.variables),
        network.preprocessing.image_shape,
        device=device,
        batch_size=batch_size,
    )
    return round(1e-3 * times.ms * find_chip(device).clock_hz)


def _folded(network: TrainedNetwork) -> tuple[Callable[[Any], Any], tuple[int, ...]]:
    """Returns the function of images that a network is, and the shape of one."""
    shape = network.preprocessing.image_shape
    model, variables = fold_batch_norm(
        network.model, network.variables, image_shape=shape
    )
    return functools.partial(model.apply, variables), shape


def _this_machine() -> dict[str, Any]:
    machine = describe_machine()
    return {name: machine[name] for name in _MACHINE}
