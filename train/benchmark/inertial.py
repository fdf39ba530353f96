"""Timing of tiled inertial convolutions, and of their parts, beside dense ones."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax import Inertial, Plan, Rate, create_model, init_variables, ops
from inertia_jax.cost.table import aligned
from inertia_jax.layers.inertial import FRICTION
from inertia_jax.models.create import abstract_variables, input_shape
from inertia_jax.models.names import check_model_name
from inertia_jax.ops.conv.conv import pad_image
from inertia_jax.ops.conv.dispatch import conv2d_to_apply, filters_for_cpu
from inertia_jax.ops.inertial.ladder import CHUNK_BYTES
from inertia_jax.ops.inertial.settings import CLOSED, OPEN
from inertia_jax.ops.inertial.tiles import fill_low, fill_open, make_tiling
from inertia_jax.ops.inertial.winograd_tiles import fill_by_winograd
from inertia_jax.plan.plan import without_ladders
from train.benchmark.suite import BaseSuite
from train.benchmark.timing import Calls, interleaved, random_images
from train.errors import UsageError, user_input

# Each entry: the number of images, their side, and their channels.
OP_SHAPES = ((64, 32, 64), (64, 16, 128))
_RATES = (0.0, 0.1, 0.25, 0.5, 1.0)
# Capacities a little above the tested shares: a chunk may have more open tiles than
# the mean.
TILED = Inertial(3, 4, reading="tiled", capacities=(1 / 8, 0.28, 0.55, 1))


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Tiled convolutions and networks beside dense ones."""

    batch_size: int = 64
    """Number of images a call of the networks."""
    width: float = 1.0
    """Width of the networks."""
    models: tuple[str, ...] = ("resnet20", "resnet18")
    """Networks to measure."""
    image_size: int | None = None
    """Side of the networks' images, in pixels; None: as they were published for."""
    layers: tuple[str, ...] = ("*",)
    """Globs over the paths of the networks' 3x3 convolutions that are inertial."""
    tile_size: int = 2
    """Side of their tiles of outputs."""
    ops: bool = True
    """Time single convolutions in 2x2 tiles, too."""
    repeats: int = 9
    """Number of timed calls of each function."""

    def cases(self) -> Iterable[Any]:
        with user_input():
            for name in self.models:
                check_model_name("models", name)
        for name, least in (("tile_size", 2), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"`{name}` (={value}) must be >= {least}.")
        return (*(OP_SHAPES if self.ops else ()), *self.models)

    def measure(self, case: Any) -> dict[str, Any]:
        if isinstance(case, str):
            return self._bench_network(case)
        return bench_op(*case, repeats=self.repeats)

    def describe(self, row: dict[str, Any]) -> str:
        dense = row["times"]["dense"]["median_ms"]
        title = row.get("model") or "x".join(map(str, row["shape"]))
        lines = []
        for name, times in row["times"].items():
            median = times["median_ms"]
            if name.startswith("part "):
                share = row["shape"][0] / row["images_of_parts"]
                lines.append([f"  {name}", f"{share:.0f} x {median:.2f} ms"])
            elif name != "dense":
                lines.append(
                    [f"  {name}", f"{median:.1f} ms", f"{dense / median:.2f}x"]
                )
        return f"{title}: dense {dense:.1f} ms\n{aligned(lines)}"

    def _bench_network(self, name: str) -> dict[str, Any]:
        """Times a network's evaluation dense, and with every tileable 3x3 inertial.

        Weights and images are random. Every layer's threshold opens the same share of
        its tiles.
        """
        model = create_model(name, width=self.width)
        shape = input_shape(model)
        if self.image_size is not None:
            shape = (self.image_size, self.image_size, shape[-1])
        variables = init_variables(model, jax.random.key(0), shape)
        x = jnp.asarray(random_images(self.batch_size, shape))
        calls: Calls = {"dense": functools.partial(jax.jit(model.apply), variables, x)}
        # One compiled network serves every rate: thresholds are variables.
        inertial = tiled_model(
            name, self.width, 0.5, layers=self.layers, tile_size=self.tile_size
        )
        tiled = jax.jit(inertial.apply)
        for rate in _RATES:
            thresholds = thresholds_at(inertial, variables, x, rate)
            changed = {**variables, "thresholds": thresholds}
            calls[f"tiled {rate:g}"] = functools.partial(tiled, changed, x)
        return {
            "model": name,
            "batch_size": self.batch_size,
            "width": self.width,
            "image_shape": shape,
            "layers": self.layers,
            "tile_size": self.tile_size,
            "times": interleaved(calls, repeats=self.repeats),
        }


def bench_op(images: int, side: int, channels: int, *, repeats: int) -> dict[str, Any]:
    """Times a 3x3 convolution dense, and inertial in 2x2 tiles at several open shares.

    Parts are compiled separately and timed on one chunk of images, the size that the
    whole layer uses on CPU. `friction` measures it. `low` applies the core once a tile.
    `open` gathers, computes and scatters a quarter of the tiles; `gather` and `compute`
    are two of its steps. On CPU closed and open tiles share products, so that `fill`
    replaces all parts but friction.
    """
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (images, side, side, channels))
    core = jax.random.normal(keys[1], (3, 3, channels, channels))
    settings: dict[str, Any] = {"region_size": TILED.region_size, "padding": 1}
    tiling = make_tiling(
        (side, side), core_size=3, region_size=4, padding=1, low=TILED.low
    )
    friction = jax.jit(
        lambda x: ops.friction(
            x, region_size=4, core_size=3, strides=2, padding=tiling.pads
        )
    )
    levels = np.asarray(friction(x))

    @jax.jit
    def tiled(x: Any, core: Any, threshold: Any) -> Any:
        capacities = TILED.capacities
        return ops.inertial_conv_tiled(
            x, core, threshold=threshold, capacities=capacities, **settings
        ).y

    on_cpu = jax.default_backend() == "cpu"
    chunk = x[: max(1, CHUNK_BYTES * images // x.nbytes)] if on_cpu else x
    padded = pad_image(chunk, tiling.pads)
    gate = jnp.asarray(levels > np.quantile(levels, 0.75))[: len(chunk)]
    capacity = gate.size // 4
    # Layers compute their convolution like this, on CPU without XLA's convolution.
    dense = jax.jit(lambda x, core: conv2d_to_apply(x, core, (1, 1), ((1, 1), (1, 1))))
    calls: Calls = {"dense": lambda: dense(x, core)}
    for rate in _RATES:
        threshold = _threshold_for(levels, rate)
        calls[f"tiled {rate:g}"] = functools.partial(tiled, x, core, threshold)
    calls["part friction"] = lambda: friction(chunk)
    filters = filters_for_cpu(x, core, tiling.pads) if on_cpu else None
    if filters is not None:
        fill = jax.jit(
            functools.partial(fill_by_winograd, tiling=tiling, capacity=capacity)
        )
        calls["part fill"] = lambda: fill(padded, filters, gate)
    else:
        low = jax.jit(functools.partial(fill_low, tiling=tiling))
        low_output = low(padded, core)
        open_quarter = jax.jit(
            functools.partial(fill_open, tiling=tiling, capacity=capacity)
        )
        patches = jnp.ones((capacity * 3, 9 * channels))
        rows = jnp.arange(capacity * 27) % (padded.size // channels)
        gather = jax.jit(lambda a, i: jnp.take(a.reshape(-1, channels), i, axis=0))
        compute = jax.jit(lambda a, core: a @ core.reshape(-1, channels))
        calls |= {
            "part low": lambda: low(padded, core),
            "part open": lambda: open_quarter(padded, core, low_output, gate),
            "part gather": lambda: gather(padded, rows),
            "part compute": lambda: compute(patches, core),
        }
    return {
        "shape": [images, side, side, channels],
        "images_of_parts": len(chunk),
        "times": interleaved(calls, repeats=repeats),
    }


def _threshold_for(levels: np.ndarray, rate: float) -> Any:
    if rate in (0, 1):
        return jnp.float32(OPEN if rate else CLOSED)
    return jnp.float32(np.quantile(levels, 1 - rate))


def tiled_model(
    name: str,
    width: float,
    rate: float,
    *,
    layers: Sequence[str] = ("*",),
    tile_size: int = 2,
) -> nn.Module:
    """Returns a network whose tileable 3x3 convolutions are inertial."""
    tiled = dataclasses.replace(TILED, region_size=2 + tile_size, threshold=Rate(rate))
    plan = Plan(tuple((glob, tiled) for glob in layers))
    return create_model(name, width=width, plan=plan)


def thresholds_at(model: nn.Module, variables: Any, x: Any, rate: float) -> Any:
    """Returns each layer's threshold for a rate, under the gates of those before it."""
    model = without_ladders(model)
    shapes = abstract_variables(model, x.shape[1:])["thresholds"]
    thresholds = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # Training mode would change BatchNorm. The thresholds are therefore computed from
    # the friction that evaluation sows, repeatedly, until later layers have settled.
    apply = jax.jit(
        lambda thresholds, x: model.apply(
            {**variables, "thresholds": thresholds}, x, mutable=["intermediates"]
        )[1]["intermediates"]
    )

    def level(sown: Any) -> Any:
        if FRICTION in sown:
            return {"threshold": _threshold_for(np.asarray(sown[FRICTION][0]), rate)}
        return {name: level(inner) for name, inner in sown.items()}

    for _ in range(1 if rate in (0, 1) else 4):
        thresholds = level(apply(thresholds, x))
    return thresholds
