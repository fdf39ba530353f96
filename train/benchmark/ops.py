"""Timing of operations alone, at the shapes of ResNet18's stages, beside PyTorch's."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from inertia_jax import ops
from inertia_jax.cost.table import aligned
from inertia_jax.ops.conv.dispatch import conv2d_to_train
from train.benchmark.inertial import TILED
from train.benchmark.suite import BaseSuite
from train.benchmark.timing import Calls, interleaved, peak_gflops, random_images
from train.errors import needs_torch

# Each entry: the side of the images, and their channels.
STAGES = ((32, 64), (16, 128), (8, 256), (4, 512))
# The ranks of Tucker-2 over the channels; about a quarter of the MACs remains.
_RANK_SHARE = 0.4
_WINDOW: dict[str, Any] = {"region_size": 3, "combine": "weighted_channel"}
_TILED: dict[str, Any] = dict(region_size=4, padding=1, capacities=TILED.capacities)


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Convolutions, their gradients, and the operations that replace them."""

    batch_size: int = 64
    """Number of images a call."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of images and kernels."""
    against: Literal["none", "torch"] = "none"
    """torch: the same operations are timed in PyTorch, too, in turn."""
    repeats: int = 9
    """Number of timed calls of each function."""

    def cases(self) -> Iterable[tuple[int, int]]:
        return STAGES

    def measure(self, case: tuple[int, int]) -> dict[str, Any]:
        """Times convolutions, their gradients, and replacements of a 3x3 convolution.

        A gradient is with respect to images and kernel together, and its time contains
        the forward pass. On CPU, layers do not use the convolutions called "XLA's".
        Inertial gates open half of the windows, or the given share of the tiles.
        Images and kernels are random.
        """
        side, channels = case
        peak = peak_gflops(self.dtype)
        x = random_images(self.batch_size, (side, side, channels))
        rng = np.random.default_rng(1)
        kernels = {
            size: rng.standard_normal((size, size, channels, channels), np.float32)
            for size in (1, 3)
        }
        rank = round(_RANK_SHARE * channels)
        factors = ops.tucker2(kernels[3], rank_in=rank, rank_out=rank)
        calls = _jax_calls(x, kernels, factors, jnp.dtype(self.dtype))
        if self.against == "torch":
            calls |= _torch_calls(x, kernels, factors, self.dtype)
        pixels = self.batch_size * side**2
        macs = {
            "conv 3x3": 9 * pixels * channels**2,
            "conv 3x3, XLA's": 9 * pixels * channels**2,
            "conv 3x3, gradient": 27 * pixels * channels**2,
            "conv 3x3, XLA's gradient": 27 * pixels * channels**2,
            "conv 1x1": pixels * channels**2,
            "Tucker-2": pixels * (2 * channels * rank + 9 * rank**2),
        }
        times = interleaved(calls, repeats=self.repeats)
        for name, spread in times.items():
            num_macs = macs.get(name.removesuffix(", PyTorch"))
            if num_macs is not None:
                spread["gflops"] = 2e-6 * num_macs / spread["median_ms"]
                spread["share_of_peak"] = spread["gflops"] / peak
        row = {"shape": list(x.shape), "dtype": self.dtype, "rank": rank}
        return {**row, "times": times, "peak_gflops": peak}

    def describe(self, row: dict[str, Any]) -> str:
        times = row["times"]
        dense = times["conv 3x3"]["median_ms"]
        lines = []
        for name, spread in times.items():
            if name.endswith(", PyTorch"):
                continue
            share, median = spread.get("share_of_peak"), spread["median_ms"]
            of_peak = "" if share is None else f"{share:.1%} of peak"
            line = [f"  {name}", f"{median:.2f} ms", of_peak, f"{dense / median:.2f}x"]
            if f"{name}, PyTorch" in times:
                theirs = times[f"{name}, PyTorch"]["median_ms"]
                line += [f"PyTorch {theirs:.2f} ms", f"ratio {median / theirs:.2f}"]
            lines.append(line)
        title = f"{row['shape']}, {row['dtype']}, Tucker-2 at ranks {row['rank']}"
        return f"{title}\n{aligned(lines)}"


def _jax_calls(
    x: np.ndarray,
    kernels: dict[int, np.ndarray],
    factors: ops.Tucker2Factors,
    dtype: Any,
) -> Calls:
    images = jnp.asarray(x, dtype)
    one, three = (jnp.asarray(kernels[size], dtype) for size in (1, 3))
    factors = ops.Tucker2Factors(*(factor.astype(dtype) for factor in factors))
    weights = jnp.full((3, 3, one.shape[-1]), 1 / 9, dtype)

    def conv(x: Any, kernel: Any) -> Any:
        return ops.conv2d(x, kernel, padding=kernel.shape[0] // 2)

    def layers_conv(x: Any, kernel: Any) -> Any:
        return conv2d_to_train(x, kernel, (1, 1), ((1, 1), (1, 1)))

    def gradient(function: Callable[..., Any]) -> Any:
        def loss(x: Any, kernel: Any) -> Any:
            y = function(x, kernel)
            return jnp.square(y.astype(jnp.float32)).mean()

        return jax.grad(loss, (0, 1))

    window = ops.friction(images, region_size=3, core_size=1)
    tile = ops.friction(images, region_size=4, core_size=3, strides=2, padding=1)
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "conv 3x3": (layers_conv, (images, three)),
        "conv 3x3, XLA's": (conv, (images, three)),
        "conv 3x3, gradient": (gradient(layers_conv), (images, three)),
        "conv 3x3, XLA's gradient": (gradient(conv), (images, three)),
        "conv 1x1": (conv, (images, one)),
        "Tucker-2": (
            lambda x, *f: ops.tucker2_conv(x, ops.Tucker2Factors(*f), padding=1),
            (images, *factors),
        ),
        "inertial, window d=3, m=1": (
            lambda x, core, weights, threshold: (
                ops.inertial_conv(
                    x, core, weights=weights, threshold=threshold, **_WINDOW
                ).y
            ),
            (images, one, weights, jnp.quantile(window, 0.5)),
        ),
    }
    for rate in (0.1, 0.25):
        functions[f"inertial, tiled {rate:g}"] = (
            lambda x, core, threshold: (
                ops.inertial_conv_tiled(x, core, threshold=threshold, **_TILED).y
            ),
            (images, three, jnp.quantile(tile, 1 - rate)),
        )
    return {
        name: functools.partial(jax.jit(function), *arguments)
        for name, (function, arguments) in functions.items()
    }


def _torch_calls(
    x: np.ndarray,
    kernels: dict[int, np.ndarray],
    factors: ops.Tucker2Factors,
    dtype: str,
) -> Calls:
    with needs_torch():
        import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def place(array: Any, axes: tuple[int, ...]) -> Any:
        tensor = torch.from_numpy(np.array(array)).to(device, getattr(torch, dtype))
        return tensor.permute(axes).contiguous(memory_format=torch.channels_last)

    images = place(x, (0, 3, 1, 2))
    one, three = (place(kernels[size], (3, 2, 0, 1)) for size in (1, 3))
    u_in, core, u_out = factors
    parts = [
        place(np.asarray(u_in)[None, None], (3, 2, 0, 1)),
        place(core, (3, 2, 0, 1)),
        place(np.asarray(u_out).T[None, None], (3, 2, 0, 1)),
    ]

    def conv(x: Any, *kernels: Any) -> Any:
        with torch.no_grad():
            for kernel in kernels:
                x = torch.nn.functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return x

    def gradient() -> Any:
        x, kernel = (a.detach().requires_grad_() for a in (images, three))
        y = torch.nn.functional.conv2d(x, kernel, padding=1)
        return torch.autograd.grad(y.float().square().mean(), (x, kernel))

    def waited(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        def call() -> Any:
            result = function(*args)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return call

    return {
        "conv 3x3, PyTorch": waited(conv, images, three),
        "conv 3x3, gradient, PyTorch": waited(gradient),
        "conv 1x1, PyTorch": waited(conv, images, one),
        "Tucker-2, PyTorch": waited(conv, images, *parts),
    }
