"""The kinds of convolution that can stand at a layer, and the kinds of threshold."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_origin

from inertia_jax.ops.inertial.settings import (
    CLOSED,
    LEAST_CLOSING,
    OPEN,
    Combine,
    GateGradient,
    Low,
    Metric,
    Reference,
    check_capacities,
    check_choice,
    check_sizes,
    check_slope,
)

Reading = Literal["window", "tiled"]


def as_python(value: Any) -> Any:
    """Returns the number that a NumPy scalar or an array without axes holds."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


# The most pixels that a side of filters and regions has. Networks are traced when they
# are made, and a layer has operations for each pixel of its filters or its region.
_MOST_SIDE = 31
# The most that any other integer is: what an axis of an array may have.
_MOST = 2**31 - 1


def _set_integer(spec: Any, name: str, least: int, most: int = _MOST) -> None:
    value = as_python(getattr(spec, name))
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not least <= value <= most:
        rule = f"<= {most}" if is_integer and value > most else f">= {least}"
        raise ValueError(f"`{name}` (={value!r:.200}) must be an integer {rule}.")
    object.__setattr__(spec, name, value)


def _set_number(spec: Any, name: str, low: float, high: float) -> None:
    value = as_python(getattr(spec, name))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        is_number = False
    if not is_number or not low <= value <= high:
        raise ValueError(
            f"`{name}` (={value!r:.200}) must be a number in [{low}, {high}]."
        )
    object.__setattr__(spec, name, value)


def _check_flag(spec: Any, name: str) -> None:
    value = getattr(spec, name)
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` (={value!r:.200}) must be True or False.")


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A friction threshold that training does not change.

    Attributes:
        value: Friction above it opens the gate; in the units of the friction.
        OPEN: The threshold below all friction, which opens every gate.
        CLOSED: The threshold above all friction, which closes every gate, also where
            friction is NaN. On CPU, tiled layers with a ladder then compute no
            friction in evaluation.

    Example:
        >>> ij.Inertial(3, 4, reading="tiled", threshold=ij.Fixed(0.5)).threshold
        Fixed(value=0.5)
        >>> ij.Fixed.OPEN.value, ij.Fixed.CLOSED.value
        (-1.0, 1e+30)
    """

    OPEN: ClassVar["Fixed"]
    CLOSED: ClassVar["Fixed"]

    value: float = 0.1

    def __post_init__(self) -> None:
        _set_number(self, "value", float("-inf"), float("inf"))

    @property
    def is_closing(self) -> bool:
        """Whether it closes every gate, as `ops.inertial.gates.is_closing` says."""
        return self.value >= LEAST_CLOSING


Fixed.OPEN, Fixed.CLOSED = Fixed(OPEN), Fixed(CLOSED)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A friction threshold that is a trained parameter.

    Attributes:
        init: Its value before training, in the units of the friction.
        per_channel: Whether each output channel has its own threshold.

    Example:
        >>> layer = ij.InertialConv(
        ...     4, 1, 3, threshold=ij.Learned(0.25), gate_gradient="ste"
        ... )
        >>> layer.init(jax.random.key(0), images)["params"]["threshold"].item()
        0.25
    """

    init: float = 0.1
    per_channel: bool = False

    def __post_init__(self) -> None:
        _set_number(self, "init", float("-inf"), float("inf"))
        _check_flag(self, "per_channel")


@dataclasses.dataclass(frozen=True)
class Rate:
    """A threshold set so that a given share of the gates opens.

    Attributes:
        target: Share of open gates, in (0, 1]. The threshold is a quantile of the
            batch in training, and the running mean of it in evaluation.

    Example:
        >>> layer = ij.InertialConv(4, 3, reading="tiled", threshold=ij.Rate(0.25))
        >>> first = layer.init(jax.random.key(0), images, train=True)
        >>> _, moved = layer.apply(
        ...     first, images, train=True, mutable=["thresholds", "intermediates"]
        ... )
        >>> sorted(moved)
        ['intermediates', 'thresholds']
        >>> moved["intermediates"]["gate_rate"][0].mean().item()
        0.25
    """

    target: float

    def __post_init__(self) -> None:
        _set_number(self, "target", 0.0, 1.0)
        if not self.target:
            raise ValueError(f"`target` (={self.target}) must be > 0.")


Threshold = Fixed | Learned | Rate


@dataclasses.dataclass(frozen=True)
class Conv:
    """The ordinary convolution.

    Attributes:
        kernel_size: Side of its filters, at most 31, on the same output grid; None: the
            network's.

    Example:
        >>> plan = ij.Plan((("conv1", ij.Conv(kernel_size=1)), ("*", ij.Conv())))
        >>> narrow = ij.create_model("lenet", width=0.0625, plan=plan)
        >>> ij.count_cost(narrow, (28, 28, 1)).rows[0].macs
        1352
    """

    kernel_size: int | None = None

    def __post_init__(self) -> None:
        if self.kernel_size is not None:
            _set_integer(self, "kernel_size", 1, _MOST_SIDE)


@dataclasses.dataclass(frozen=True)
class Inertial:
    """An inertial convolution: a small core, applied in detail where friction is high.

    Attributes:
        core_size: Side m of the core filter, >= 1.
        region_size: Side d of the region, > `core_size`, at most 31.
        reading: `window`, one region per output position, or `tiled`, one region per
            tile of (d - m + 1)^2 outputs (stride 1 only).
        metric: Measure of the difference between periphery and reference; `random` is
            a control whose gates do not depend on differences.
        reference: The region's middle pixel, or the mean of its core patch.
        relative: Whether friction is divided by its mean: the batch's mean in
            training, the running mean in evaluation.
        combine: Join of the shifted core responses in the window reading.
        zero_middle: Whether the middle weight of `combine="weighted"` is held at 0.
        low: Value that fills a tile of low friction: its mean output, or one sample.
        threshold: Threshold of the gate; one per channel in the window reading alone.
        gate_gradient: `none`, or `ste` (straight-through).
        slope: Steepness of the sigmoid behind the straight-through gradient, > 0.
        channel_stride: Step over the channels that friction reads, >= 1.
        capacities: Shares of open tiles that evaluation of the tiled reading is
            compiled for, at most 64, rising to 1; None computes every tile.

    Example:
        >>> spec = ij.Inertial(3, 4, reading="tiled", threshold=ij.Rate(0.25))
        >>> gated = ij.create_model(
        ...     "lenet", width=0.0625, plan=ij.Plan((("conv2", spec),))
        ... )
        >>> row = ij.count_cost(gated, (28, 28, 1)).rows[1]
        >>> row.kind, row.dense_macs, row.macs, row.core_macs
        ('inertial', 41472, 18144, 10368)
    """

    core_size: int
    region_size: int
    reading: Reading = "window"
    metric: Metric = "l1"
    reference: Reference = "center"
    relative: bool = False
    combine: Combine = "mean"
    zero_middle: bool = False
    low: Low = "mean"
    threshold: Threshold = Fixed()
    gate_gradient: GateGradient = "none"
    slope: float = 10.0
    channel_stride: int = 1
    capacities: Sequence[float] | None = (1 / 16, 1 / 8, 3 / 16, 5 / 16, 1 / 2, 1)

    def __post_init__(self) -> None:
        _set_integer(self, "core_size", 1, _MOST_SIDE)
        _set_integer(self, "region_size", 2, _MOST_SIDE)
        check_sizes(core_size=self.core_size, region_size=self.region_size)
        for field in dataclasses.fields(self):
            if field.type is bool:
                _check_flag(self, field.name)
            elif get_origin(field.type) is Literal:
                check_choice(field.name, getattr(self, field.name), field.type)
        if not isinstance(self.threshold, Threshold):
            raise ValueError(
                f"`threshold` (={self.threshold!r:.200}) must be a Fixed, Learned or "
                f"Rate."
            )
        _set_number(self, "slope", 0.0, float("inf"))
        check_slope(self.slope)
        _set_integer(self, "channel_stride", 1)
        check_capacities(self.capacities)
        if self.capacities is not None:
            shares = tuple(as_python(share) for share in self.capacities)
            object.__setattr__(self, "capacities", shares)
        if self.zero_middle and self.combine != "weighted":
            raise ValueError(
                f"`zero_middle` (=True) must be False unless `combine` "
                f"(={self.combine!r}) is 'weighted'."
            )
        if self.reading == "window" and self.low != "mean":
            raise ValueError(
                f"`low` (={self.low!r}) must be 'mean' in the window reading."
            )
        if self.reading == "tiled":
            if self.combine != "mean":
                raise ValueError(
                    f"`combine` (={self.combine!r}) must be 'mean' in the "
                    f"tiled reading."
                )
            if isinstance(self.threshold, Learned) and self.threshold.per_channel:
                raise ValueError(
                    f"`threshold` (={self.threshold}) must not be `per_channel` in the "
                    f"tiled reading."
                )


@dataclasses.dataclass(frozen=True)
class Tucker2:
    """A Tucker-2 factorised convolution: 1x1, core, 1x1.

    Attributes:
        rank_in: Channels between the first 1x1 and the core, >= 1.
        rank_out: Channels between the core and the last 1x1, >= 1.
        core: Spec of the core convolution.

    Example:
        >>> plan = ij.Plan((("conv2", ij.Tucker2(rank_in=1, rank_out=2)),))
        >>> small = ij.create_model("lenet", width=0.0625, plan=plan)
        >>> ij.count_cost(small, (28, 28, 1)).rows[1].ranks
        (1, 2)
    """

    rank_in: int
    rank_out: int
    core: Conv | Inertial = Conv()

    def __post_init__(self) -> None:
        _set_integer(self, "rank_in", 1)
        _set_integer(self, "rank_out", 1)
        if not isinstance(self.core, (Conv, Inertial)):
            raise ValueError(
                f"`core` (={self.core!r:.200}) must be a Conv or an Inertial."
            )


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Two factors in place of a 1x1 convolution.

    Attributes:
        rank: Channels between the two, >= 1.

    Example:
        >>> from flax import linen as nn
        >>> plan = ij.Plan((("*", ij.LowRank(2)),))
        >>> network = ij.Planned(nn.Conv(8, (1, 1)), plan)
        >>> ij.count_cost(network, (6, 6, 8)).rows[0].ranks
        (2,)
    """

    rank: int

    def __post_init__(self) -> None:
        _set_integer(self, "rank", 1)


Spec = Conv | Inertial | Tucker2 | LowRank


def fields_as(cls: type, source: Any) -> dict[str, Any]:
    """Reads the fields of a spec's class off an object that has them by name."""
    return {
        field.name: getattr(source, field.name) for field in dataclasses.fields(cls)
    }


def core_of(spec: Spec) -> Conv | Inertial | LowRank:
    """Returns the core of a Tucker-2 convolution; any other is its own core."""
    return spec.core if isinstance(spec, Tucker2) else spec


def stays_dense(spec: Spec, *, kernel_size: int, strides: int) -> str | None:
    """Returns why a convolution cannot become what the plan has, or None if it can."""
    spec = core_of(spec)
    if not isinstance(spec, Inertial):
        return None
    if spec.core_size > kernel_size:
        return f"core {spec.core_size} exceeds kernel {kernel_size}"
    if spec.reading == "tiled" and strides != 1:
        return f"tiles need stride 1, it has {strides}"
    return None


def without_inertia(spec: Spec) -> Spec:
    """Returns a spec with the ordinary convolution in place of an inertial one."""
    if isinstance(spec, Tucker2):
        return dataclasses.replace(spec, core=Conv())
    return Conv()
