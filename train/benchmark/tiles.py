"""Where tiles pay: one convolution, dense and in tiles, over sides and channels."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from inertia_jax import Conv, Inertial
from inertia_jax.atomic import appearing
from inertia_jax.compression.sites import Site
from inertia_jax.compression.tile_costs import layer_times
from inertia_jax.cost.table import aligned
from train.benchmark.suite import BaseSuite
from train.errors import UsageError, user_input
from train.run.outputs import check_output_file

# A call has about this many numbers in its images, but one image at least.
_NUMBERS = 2**22
# The shares of open tiles, of `TIMED_RATES`, that the figure has.
_SHOWN = (0.0, 0.1)


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """One 3x3 convolution in tiles, beside its dense form, over sides and channels."""

    sides: tuple[int, ...] = (28, 56, 112, 224)
    """Sides of the images, in pixels."""
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Numbers of channels, of input and output."""
    tile_sizes: tuple[int, ...] = (2, 4, 8)
    """Sides of the tiles of outputs."""
    figure: str | None = None
    """File for the map, as PNG or SVG: a panel for each side of tiles."""

    def cases(self) -> Iterable[Any]:
        check_output_file("figure", self.figure)
        if self.figure is not None and _suffix(self.figure) not in ("png", "svg"):
            raise UsageError(f"`figure` (={self.figure}) must end in .png or .svg.")
        for name, least in (("sides", 1), ("channels", 1), ("tile_sizes", 2)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise UsageError(f"`{name}` (={values}) must be >= {least}, each.")
        return itertools.product(self.tile_sizes, self.sides, self.channels)

    def measure(self, case: tuple[int, int, int]) -> dict[str, Any]:
        tile, side, channels = case
        images = max(1, _NUMBERS // (side * side * channels))
        shape = (side, side, channels)
        times = layer_times(
            _convolution(shape),
            Inertial(3, 2 + tile, reading="tiled"),
            batch_size=images,
            dtype=jnp.float32,
        )
        return {
            "tile_size": tile,
            "shape": [images, *shape],
            "dense_ms": times.dense,
            "open": times.rates,
            "ms": times.costs,
        }

    def describe(self, row: dict[str, Any]) -> str:
        cells = [
            [f"  {_words(rate)}", f"{ms:.2f} ms", f"{row['dense_ms'] / ms:.2f}x"]
            for rate, ms in zip(row["open"], row["ms"], strict=True)
        ]
        n, title = row["tile_size"], "x".join(map(str, row["shape"]))
        return f"{title}, {n}x{n}: dense {row['dense_ms']:.2f} ms\n{aligned(cells)}"

    def rows(self) -> Iterator[dict[str, Any]]:
        found = []
        for row in super().rows():
            found.append(row)
            yield row
        if self.figure is not None:
            self._draw(found, pathlib.Path(self.figure))

    def _draw(self, rows: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
        """Draws how many times as fast as dense tiles are, by side and channels."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        gains = {
            (row["tile_size"], row["shape"][1], row["shape"][3]): [
                row["dense_ms"] / row["ms"][row["open"].index(rate)] for rate in _SHOWN
            ]
            for row in rows
        }
        size = (1.2 + 2.9 * len(self.tile_sizes), 3.1)
        figure, panels = pyplot.subplots(
            1,
            len(self.tile_sizes),
            figsize=size,
            squeeze=False,
            layout="constrained",
        )
        for axes, tile in zip(panels[0], self.tile_sizes, strict=True):
            grid = np.full((len(self.sides), len(self.channels)), np.nan)
            for (i, side), (j, c) in itertools.product(
                enumerate(self.sides), enumerate(self.channels)
            ):
                if (tile, side, c) in gains:
                    values = gains[tile, side, c]
                    grid[i, j] = np.log2(values[-1])
                    text = "\n".join(f"{value:.2f}" for value in values)
                    axes.text(j, i, text, ha="center", va="center", fontsize=8)
            axes.imshow(grid, cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
            axes.set_xticks(range(len(self.channels)), map(str, self.channels))
            axes.set_yticks(range(len(self.sides)), map(str, self.sides))
            axes.set_title(f"{tile} x {tile} tiles", fontsize=10)
            axes.set_xlabel("channels")
        panels[0][0].set_ylabel("side of the image")
        shares = ", and ".join(map(_words, _SHOWN))
        figure.suptitle(f"times as fast as dense: tiles {shares}", fontsize=10)
        with user_input(), appearing(file) as partial:
            figure.savefig(partial, dpi=120, format=_suffix(str(file)))
        pyplot.close(figure)


def _words(rate: float) -> str:
    """Returns a share of open tiles in words; without any, friction may be computed."""
    return f"{rate:.0%} open" if rate else "closed"


def _suffix(file: str) -> str:
    return pathlib.PurePath(file).suffix[1:].lower()


def _convolution(shape: tuple[int, int, int]) -> Site:
    """Returns a 3x3 convolution that keeps the shape [h, w, c] of its images."""
    return Site(
        path="",
        kernel=np.zeros((3, 3, shape[-1], shape[-1]), np.float32),
        groups=1,
        strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dilation=(1, 1),
        calls=((shape, shape),),
        spec=Conv(),
        core=Conv(),
    )
