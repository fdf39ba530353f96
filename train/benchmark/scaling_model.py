"""A model of the time that a training step takes to compute and to send."""

import dataclasses
import math

import jax
from flax import linen as nn

from inertia_jax import count_cost
from inertia_jax.models.create import abstract_variables, input_shape

# Loss and gate rate are float32; the counts of right answers and examples are int32.
_METRIC_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """The counts of a network's training step that hold for any number of devices.

    Attributes:
        name: The network's name.
        params: The number of parameters; all are trained, with gradients in float32.
        statistics: The number of running means and variances of BatchNorm, two a
            channel, in float32.
        averages: The number of other averaged values, which are thresholds.
        norms: The number of BatchNorm layers with statistics of the whole batch.
        macs: The multiply-accumulates of a forward pass of one image.
    """

    name: str
    params: int
    statistics: int
    averages: int
    norms: int
    macs: int

    @property
    def gradient_bytes(self) -> int:
        """Bytes reduced once a step: gradients, running statistics and metrics."""
        return 4 * (self.params + self.statistics + self.averages) + _METRIC_BYTES

    @property
    def norm_bytes(self) -> int:
        """Bytes reduced layer by layer: BatchNorm's statistics and their gradients."""
        return 2 * 4 * self.statistics if self.norms else 0

    @property
    def flops(self) -> int:
        """FLOPs of one image: two a MAC, forward once and backward twice."""
        return 3 * 2 * self.macs


@dataclasses.dataclass(frozen=True)
class Machine:
    """Accelerators and their links, under the assumptions of docs/scaling.md.

    Attributes:
        name: The names of device and link.
        flops_per_s: The peak of one device in bfloat16.
        bytes_per_s: The bytes that a device sends, while it receives as many.
        latency_s: The seconds of one message between neighbours.
        fewest: The smallest number of devices, beside 1, that such links join.
        most: The largest number of devices that they join.
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
    """Counts a network's step, with `dense` at the MACs of the dense convolutions."""
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


def sending_seconds(
    step: Step, machine: Machine, num_devices: int
) -> tuple[float, float]:
    """Predicts the seconds of reducing gradients, and statistics of BatchNorm.

    Gradients go round a ring: `2 (n-1)/n bytes / bandwidth + 2 (n-1) latency`.
    Statistics of BatchNorm, a few kilobytes, go up and down a tree: `2 ceil(log2 n)
    latency` each, forward and backward. They never overlap with computing, because the
    next layer waits for them.

    Args:
        step: The counts of the step.
        machine: The devices and their links.
        num_devices: The number n of devices.
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
    """Predicts the seconds of a step.

    Args:
        step: The counts of the step.
        machine: The devices and their links.
        num_devices: The number of devices.
        batch_size: The number of images a step, on all devices together.
        utilisation: The share of the peak that computing reaches.
        overlap: Whether gradients are sent while others are computed (the best case),
            or after all of them (the worst).
    """
    rate = machine.flops_per_s * utilisation
    compute = step.flops * batch_size / num_devices / rate
    gradients, norms = sending_seconds(step, machine, num_devices)
    if overlap:
        # The backward pass, which makes the gradients, is two thirds of the computing.
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
    """Returns the images a second of n devices over n times those of one device.

    That device has `batch_alone` images a step; the rest is as in `step_seconds`.
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
