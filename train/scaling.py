"""Scaling on paper: what a training step sends and computes, and what that predicts.

`python -m train.scaling` prints the tables of docs/scaling.md; `--write FILE` puts them
between that file's two markers.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn

from inertia_jax import Conv, Fixed, Inertial, Plan, Tucker2, count_cost, create_model
from inertia_jax.models import abstract_variables, input_shape
from inertia_jax.sites import find_sites

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARKER = "<!-- tables of python -m train.scaling -->"
# Loss and gate rate in float32; right answers and examples in int32.
_METRIC_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step of a network needs, whatever the number of devices.

    Attributes:
        name: Of the network.
        params: Parameters, all trained, whose gradients are float32.
        statistics: Running means and variances of BatchNorm, two a channel, float32.
        averages: Other numbers that are averaged: thresholds.
        norms: BatchNorm layers whose statistics are those of the whole batch.
        macs: Multiply-accumulates of a forward pass of one image.
    """

    name: str
    params: int
    statistics: int
    averages: int
    norms: int
    macs: int

    @property
    def gradient_bytes(self) -> int:
        """Reduced once a step: gradients, running statistics and metrics."""
        return 4 * (self.params + self.statistics + self.averages) + _METRIC_BYTES

    @property
    def norm_bytes(self) -> int:
        """Reduced layer by layer: BatchNorm's statistics, and their gradients."""
        return 2 * 4 * self.statistics if self.norms else 0

    @property
    def flops(self) -> int:
        """Of one image: forward, and twice that backward; two FLOPs a MAC."""
        return 3 * 2 * self.macs


@dataclasses.dataclass(frozen=True)
class Machine:
    """Accelerators and their links; what is assumed of them is in docs/scaling.md.

    Attributes:
        name: Of both.
        flops_per_s: Peak of one device, bfloat16.
        bytes_per_s: That a device sends, in one direction, while it receives as many.
        latency_s: Of one message between neighbours.
        fewest: Devices that such links join, more than one.
        most: Likewise.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    latency_s: float
    fewest: int
    most: int


MACHINES = (
    Machine("H100, NVLink", 989e12, 450e9, 3e-6, 2, 8),
    Machine("H100, InfiniBand NDR", 989e12, 50e9, 5e-6, 2, 256),
    Machine("H100, 100 Gb/s Ethernet", 989e12, 12.5e9, 30e-6, 2, 256),
    Machine("TPU v5e, ICI", 197e12, 200e9, 1e-6, 4, 256),
)


def count_step(name: str, model: nn.Module, *, dense: bool = False) -> Step:
    """Counts a network's step; `dense` takes the MACs of the form that is trained."""
    shape = input_shape(model)
    variables = abstract_variables(model, shape)
    params = jax.tree.leaves(variables.pop("params"))
    others = jax.tree.leaves(variables)
    statistics = [leaf.size for leaf in others if leaf.ndim]
    cost = count_cost(model, shape)
    return Step(
        name=name,
        params=sum(leaf.size for leaf in params),
        statistics=sum(statistics),
        averages=len(others) - len(statistics),
        norms=len(statistics) // 2,
        macs=cost.dense_macs if dense else cost.macs,
    )


def tucker_model(name: str, share: float) -> nn.Module:
    """Returns a network whose 3x3 convolutions have ranks for a share of its MACs.

    The ranks are one fraction of every layer's channels, the largest sixty-fourth that
    keeps to the share; the first convolution stays.
    """
    dense = create_model(name)
    shape = input_shape(dense)
    variables = abstract_variables(dense, shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    total = count_cost(dense, shape).macs
    sites = {
        path: site
        for path, site in find_sites(dense, zeros, shape).items()
        if site.kernel.shape[0] > 1 and site.kernel.shape[2] > 3
    }

    def specs(part: int) -> dict[str, Tucker2]:
        ranks = {
            path: [max(1, channels * part // 64) for channels in site.kernel.shape[2:]]
            for path, site in sites.items()
        }
        return {path: Tucker2(*both) for path, both in ranks.items()}

    def macs(part: int) -> int:
        saved = sum(
            sites[path].macs(Conv()) - sites[path].macs(spec)
            for path, spec in specs(part).items()
        )
        return total - saved

    most = max(part for part in range(1, 65) if macs(part) <= share * total)
    return create_model(name, plan=Plan(tuple(specs(most).items())))


def all_steps(names: Sequence[str] | None = None) -> Iterator[Step]:
    """Yields the steps of the tables, or those of some networks."""
    for name in ("resnet18", "vgg16", "simpledla", "resnet20", "lenet"):
        if names is None or name in names:
            yield count_step(name, create_model(name))
    for share in (0.5, 0.25):
        label = f"resnet18, Tucker-2 at {share}"
        if names is None or label in names:
            yield count_step(label, tucker_model("resnet18", share))
    label = "resnet18, tiled"
    if names is None or label in names:
        tiled = Inertial(3, 4, reading="tiled", threshold=Fixed(0.1))
        model = create_model("resnet18", plan=Plan((("layer*conv*", tiled),)))
        yield count_step(label, model, dense=True)
    label = "resnet18, --no-sync-batch-norm"
    if names is None or label in names:
        step = count_step(label, create_model("resnet18"))
        yield dataclasses.replace(step, norms=0)


def sending_seconds(
    step: Step, machine: Machine, num_devices: int
) -> tuple[float, float]:
    """Predicts how long gradients, and statistics of BatchNorm, take to be reduced.

    Gradients go round a ring: `2 (n-1)/n bytes / bandwidth + 2 (n-1) latency`.
    Statistics of BatchNorm, a few kilobytes, go up and down a tree: `2 ceil(log2 n)
    latency` each, forward and backward, and never overlap: the next layer waits.

    Args:
        step: What is sent and computed.
        machine: Devices and links.
        num_devices: n.
    """
    n = num_devices
    ring = 2 * (n - 1) / n / machine.bytes_per_s
    gradients = ring * step.gradient_bytes + 2 * (n - 1) * machine.latency_s
    hops = 2 * math.ceil(math.log2(n)) * machine.latency_s
    return gradients, ring * step.norm_bytes + 2 * step.norms * hops


def step_seconds(
    step: Step,
    machine: Machine,
    num_devices: int,
    *,
    batch_size: int,
    utilisation: float,
    overlap: bool,
) -> float:
    """Predicts the time of a step.

    Args:
        step: What is sent and computed.
        machine: Devices and links.
        num_devices: Of them.
        batch_size: Of all devices together.
        utilisation: Share of the peak that computing reaches.
        overlap: Whether gradients are sent while others are computed, at best, or
            after them, at worst.
    """
    rate = machine.flops_per_s * utilisation
    compute = step.flops * batch_size / num_devices / rate
    gradients, norms = sending_seconds(step, machine, num_devices)
    if overlap:
        # Gradients come with the backward pass, two thirds of the whole.
        return norms + compute + max(0.0, gradients - 2 / 3 * compute)
    return norms + compute + gradients


def efficiency(
    step: Step,
    machine: Machine,
    num_devices: int,
    *,
    batch_size: int,
    batch_alone: int,
    utilisation: float,
    overlap: bool,
) -> float:
    """Returns images a second of n devices over n times those of one.

    Args:
        step: See `step_seconds`, as all the others.
        machine: Likewise.
        num_devices: Likewise.
        batch_size: Likewise.
        batch_alone: Images a step of the one device compared with.
        utilisation: Likewise.
        overlap: Likewise.
    """

    def images_per_s(n: int, batch_size: int) -> float:
        return batch_size / step_seconds(
            step,
            machine,
            n,
            batch_size=batch_size,
            utilisation=utilisation,
            overlap=overlap,
        )

    together = images_per_s(num_devices, batch_size)
    return together / (num_devices * images_per_s(1, batch_alone))


def tables(steps: Sequence[Step]) -> str:
    """Returns the tables as Markdown."""
    lines = [
        "| network | parameters | gradients, statistics, metrics | synchronised "
        "BatchNorm | all-reduced a step | GFLOP an image |",
        "|---|---|---|---|---|---|",
    ]
    for step in steps:
        total = step.gradient_bytes + step.norm_bytes
        lines.append(
            f"| {step.name} | {step.params:,} | {step.gradient_bytes:,} B | "
            f"{step.norm_bytes:,} B | {total / 1e6:.3f} MB | {step.flops / 1e9:.3f} |"
        )
    lines += ["", "**Milliseconds on 8 devices: gradients + BatchNorm**", ""]
    lines.append("| network | " + " | ".join(m.name for m in MACHINES) + " |")
    lines.append("|---" * (1 + len(MACHINES)) + "|")
    for step in steps:
        cells = [
            " + ".join(f"{1e3 * s:.2f}" for s in sending_seconds(step, machine, 8))
            for machine in MACHINES
        ]
        lines.append(f"| {step.name} | " + " | ".join(cells) + " |")
    for title, per_device, in_all in (
        ("Weak scaling, 128 images a device", 128, None),
        ("Strong scaling, 1024 images in all", None, 1024),
        ("Strong scaling, 128 images in all", None, 128),
    ):
        for machine in MACHINES:
            most = min(machine.most, in_all or machine.most)
            devices = [n for n in DEVICES if n == 1 or machine.fewest <= n <= most]
            lines += ["", f"**{title}: {machine.name}**", ""]
            lines.append("| network | " + " | ".join(map(str, devices)) + " |")
            lines.append("|---" * (1 + len(devices)) + "|")
            for step in steps:
                cells = [
                    _cell(
                        step,
                        machine,
                        n,
                        batch_size=in_all or (per_device or 0) * n,
                        batch_alone=in_all or per_device or 0,
                    )
                    for n in devices
                ]
                lines.append(f"| {step.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(
    step: Step, machine: Machine, n: int, *, batch_size: int, batch_alone: int
) -> str:
    def at(utilisation: float, *, overlap: bool) -> str:
        share = efficiency(
            step,
            machine,
            n,
            batch_size=batch_size,
            batch_alone=batch_alone,
            utilisation=utilisation,
            overlap=overlap,
        )
        return f"{100 * share:.0f}"

    # The faster the computing, the more the sending shows.
    low, high = at(0.4, overlap=False), at(0.2, overlap=True)
    return low if low == high else f"{low}-{high}"


def main() -> None:
    """Prints the tables, or writes them into the document."""
    parser = argparse.ArgumentParser(
        prog="python -m train.scaling", description=__doc__
    )
    parser.add_argument("--write", type=pathlib.Path, help="file with the markers")
    file = parser.parse_args().write
    text = tables(list(all_steps()))
    if file is None:
        print(text)
        return
    before, _, after = file.read_text().split(MARKER)
    file.write_text(f"{before}{MARKER}\n\n{text}\n\n{MARKER}{after}")


if __name__ == "__main__":
    main()
