"""The effect of compression on each layer of a network: a row a layer, and totals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.compression.chip_times import chip_times
from inertia_jax.compression.latency import site_latencies_ms
from inertia_jax.compression.sites import Site, find_sites
from inertia_jax.cost.table import aligned
from inertia_jax.layers.kinds import ranks_of


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One convolution, before and after.

    Attributes:
        path: The layer's path.
        shape: The kernel's shape [kh, kw, c_in / groups, c_out].
        ranks: (rank_in, rank_out) of Tucker-2, (rank,) of two factors, or () where the
            convolution stays as it is.
        energy: The share of the kernel's squared norm that is left,
            1 - |K - K'|^2 / |K|^2.
        params: The numbers of parameters before and after, without the bias.
        macs: The MACs an image before and after.
        latency_ms: The milliseconds a call before and after, measured here or as the
            compiler of a chip estimates them; None where layers were not timed.
    """

    path: str
    shape: Sequence[int]
    ranks: Sequence[int]
    energy: float
    params: Sequence[int]
    macs: Sequence[int]
    latency_ms: Sequence[float] | None


def report_layers(
    before: tuple[nn.Module, Mapping[str, Any]],
    after: tuple[nn.Module, Mapping[str, Any]],
    image_shape: tuple[int, ...],
    *,
    latency_batch: int,
    device: str | None = None,
) -> list[LayerReport]:
    """Compares every convolution of two networks that differ in form alone.

    Args:
        before: Model and variables before compression.
        after: Model and variables after it.
        image_shape: The shape [h, w, c] of the networks' input.
        latency_batch: The number of images a call with which each layer is timed, both
            forms in alternation; 0: layers are not timed.
        device: The chip whose compiler estimates these times, within the networks.
            None: they are measured on this machine, each layer by itself.
    """
    old_sites = find_sites(*before, image_shape)
    new_sites = find_sites(*after, image_shape)
    dtype = getattr(before[0], "dtype", None) or jnp.float32
    rows = []
    estimates = []
    if device is not None:
        estimates = [
            chip_times(
                network, image_shape, device=device, batch_size=latency_batch
            ).layers
            for network in (before, after)
        ]
    times: dict[Any, list[float]] = {}
    for path, new in new_sites.items():
        old = old_sites[path]
        latency_ms = None
        if estimates:
            latency_ms = [layers.get(path, 0.0) for layers in estimates]
        elif latency_batch:
            key = (old.geometry, old.spec, new.spec)
            if key not in times:
                times[key] = site_latencies_ms(
                    old,
                    [old.spec, new.spec],
                    batch_size=latency_batch,
                    dtype=dtype,
                )
            latency_ms = times[key]
        rows.append(
            LayerReport(
                path=path,
                shape=old.kernel.shape,
                ranks=ranks_of(new.spec),
                energy=_energy(old, new),
                params=(old.params(old.spec), new.params(new.spec)),
                macs=(old.macs(old.spec), new.macs(new.spec)),
                latency_ms=latency_ms,
            )
        )
    return rows


def _energy(old: Site, new: Site) -> float:
    kernel = np.asarray(old.kernel, np.float64)
    missed = np.sum((kernel - np.asarray(new.kernel, np.float64)) ** 2)
    total = np.sum(kernel**2)
    return float(1 - missed / total) if total > 0 else 1.0


def format_layers(rows: list[LayerReport], device: str | None = None) -> str:
    """Returns the rows as a table, a line a layer, timed on a chip or here."""
    timed = any(row.latency_ms for row in rows)
    header = ["layer", "kernel", "ranks", "energy", "parameters", "MACs"]
    milliseconds = "ms" if device is None else f"ms on {device}, estimated"
    lines = [[*header, milliseconds] if timed else header]
    for row in rows:
        line = [
            row.path,
            "x".join(map(str, row.shape)),
            ",".join(map(str, row.ranks)) or "stays dense",
            f"{row.energy:.3f}",
            _change(row.params),
            _change(row.macs),
        ]
        if timed and row.latency_ms:
            line.append(f"{row.latency_ms[0]:.3g} -> {row.latency_ms[1]:.3g}")
        lines.append(line)
    total = ["all of these", "", "", ""]
    for pairs in ([row.params for row in rows], [row.macs for row in rows]):
        total.append(_change([sum(values) for values in zip(*pairs, strict=True)]))
    if timed:
        latencies = [row.latency_ms for row in rows if row.latency_ms]
        before, after = (sum(values) for values in zip(*latencies, strict=True))
        total.append(f"{before:.3g} -> {after:.3g}")
    lines.append(total)
    return aligned(lines, left=3)


def _change(values: Sequence[int]) -> str:
    before, after = values
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
