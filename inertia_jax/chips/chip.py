"""Accelerators by name, with what their maker publishes of them."""

import dataclasses
import math

from inertia_jax.ops.inertial.settings import near_miss


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator. All figures are published ones, never measured.

    No peak in float32 is published: products of float32 are rounded to bfloat16 unless
    a `precision` asks for several passes.

    Attributes:
        name: The name, such as "v5e".
        host: The number of chips of one host along each axis of their network.
        bfloat16_flops: The peak in bfloat16, in FLOP per second, two for each
            multiply-accumulate.
        memory_bandwidth: The peak of the main memory, in bytes per second.
        memory_bytes: The size of the main memory, in bytes.
        clock_hz: The clock by which the compiler's cycles become seconds.
        most_chips: The number of chips of the largest machine. The compiler of TPUs
            ends the process where a program is for more.
    """

    name: str
    host: tuple[int, ...]
    bfloat16_flops: float
    memory_bandwidth: float
    memory_bytes: int
    clock_hz: float
    most_chips: int

    def topology_name(self, num_chips: int = 1) -> str:
        """Returns libtpu's name of the least machine of so many chips.

        Raises:
            ValueError: The number is neither 1 nor 4, 8, 16 and so on, or no machine
                has so many.
        """
        shape = list(self.host)
        while math.prod(shape) < num_chips:
            # The last of the shortest axes, which keeps the machine nearly a cube.
            axis = max(range(len(shape)), key=lambda i: (-shape[i], i))
            shape[axis] *= 2
        if num_chips not in (1, math.prod(shape)) or num_chips > self.most_chips:
            raise ValueError(
                f"`num_chips` (={num_chips}) must be 1, or 4 times a power of two, up "
                f"to {self.most_chips} for {self.name}."
            )
        return f"{self.name}:{'x'.join(map(str, shape))}"


# Peaks, sizes and largest machines: https://docs.cloud.google.com/tpu/docs/v4, /v5e,
# /v5p and /v6e; their GB of memory are taken for GiB. Clocks are not published there:
# each is the peak over the FLOP of a cycle, 2 * 128^2 in each matrix unit of v5e (4),
# v4 and v5p (8), and 4 * 256^2 in those of v6e (2). By the compiler's cycles and these
# clocks, a product of 8192 x 8192 matrices takes 0.88 (v5e), 0.90 (v5p) and 0.70 (v6e)
# of the peak, but 0.45 on v4, which is counted as if one of its two cores worked
# (libtpu 0.0.42).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", (2, 2, 1), 275e12, 1200e9, 32 << 30, 1.05e9, 4096),
        Chip("v5e", (2, 2), 197e12, 819e9, 16 << 30, 1.5e9, 256),
        Chip("v5p", (2, 2, 1), 459e12, 2765e9, 95 << 30, 1.75e9, 6144),
        Chip("v6e", (2, 2), 918e12, 1638e9, 32 << 30, 1.75e9, 256),
    )
}


def find_chip(name: str) -> Chip:
    """Returns a chip by its name.

    Raises:
        ValueError: No chip has this name; the message has the near miss and the list.
    """
    if name not in CHIPS:
        raise ValueError(
            f"`device` (={name!r}) must be one of {', '.join(CHIPS)}."
            f"{near_miss(name, CHIPS)}"
        )
    return CHIPS[name]
