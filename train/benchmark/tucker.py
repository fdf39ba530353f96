"""Timing of Tucker-2 networks and of compressing them, beside PyTorch and TensorLy."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np

from inertia_jax import (
    Budget,
    Plan,
    Ratio,
    compress,
    count_cost,
    create_model,
    init_variables,
    to_torch,
)
from inertia_jax.compression.sites import Site, find_sites
from inertia_jax.cost.table import aligned
from inertia_jax.interop import torch_key
from inertia_jax.models.create import input_shape
from inertia_jax.plan.specs import Tucker2
from train.benchmark.suite import NetworkSuite
from train.benchmark.timing import interleaved, relative_gap
from train.compress.layer_report import LayerReport, format_layers, report_layers
from train.errors import UsageError, needs_torch

RULES: dict[str, dict[str, Any]] = {
    "ratio 0.2": {"ranks": Ratio(0.2)},
    "budget 0.25": {"ranks": Budget(macs=0.25)},
    # Vector units like multiples of 8: 17 channels take longer than 24.
    "budget 0.25 by 8": {"ranks": Budget(macs=0.25), "round_to": 8},
}


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Compressed networks beside dense ones, at batch 1 and at `batch_size`.

    With `--against torch`, TensorLy factorises the same kernels, too.
    """

    stem: Literal["cifar", "imagenet"] = "cifar"
    """Stem of resnet18; imagenet: torchvision's, 1,000 classes at 224 x 224."""
    repeats: int = 9
    """Timed calls of each."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times each network, its layers, and compressing it.

        Raises:
            UsageError: A stem that a network has not.
        """
        if self.stem != "cifar" and self.models != ("resnet18",):
            raise UsageError(f"`stem` (={self.stem}) is for `models` (=resnet18).")
        options = {"batch_sizes": self.both_batches, "repeats": self.repeats}
        yield from self.each_model(
            bench_tucker, format_tucker, stem=self.stem, **options
        )


def bench_tucker(
    name: str,
    *,
    batch_sizes: tuple[int, ...],
    width: float,
    repeats: int,
    against_torch: bool,
    stem: str = "cifar",
) -> dict[str, Any]:
    """Times a network's evaluation dense and compressed, its layers, and compressing.

    Weights are random: a trained network has other ranks under the same budget, but
    they cost the same.

    Args:
        name: The network's name.
        batch_sizes: Images a call; layers are timed at the largest.
        width: The network's width.
        repeats: Timed calls of each.
        against_torch: Whether the same networks are timed in PyTorch, in turn, and
            TensorLy's factors are compared.
        stem: The stem of resnet18; `imagenet` has torchvision's 1,000 classes, at
            224 x 224.
    """
    classes = 1000 if stem == "imagenet" else 10
    model = create_model(name, width=width, stem=stem, num_classes=classes)
    variables = init_variables(model, jax.random.key(0))
    shape = input_shape(model)
    networks = {"dense": (model, variables)}
    networks |= {k: compress(*networks["dense"], **r) for k, r in RULES.items()}
    dense_macs = count_cost(model, shape).macs
    row: dict[str, Any] = {"model": name, "stem": stem, "width": width, "networks": {}}
    for key, network in networks.items():
        cost = count_cost(network[0], shape)
        row["networks"][key] = {
            "params": cost.params,
            "macs": cost.macs,
            "share": cost.macs / dense_macs,
        }
    row["times"] = {}
    for batch_size in batch_sizes:
        images = np.random.default_rng(0).standard_normal((batch_size, *shape))
        images = images.astype(np.float32)
        calls: dict[str, Callable[[], Any]] = {
            f"{key}, JAX": _jax_call(*network, images)
            for key, network in networks.items()
        }
        if against_torch:
            for key, network in networks.items():
                ours = np.asarray(calls[f"{key}, JAX"]())
                calls[f"{key}, PyTorch"] = call = torch_call(*network, images)
                gap = relative_gap(call(), ours)
                row["networks"][key][f"gap_to_torch_batch_{batch_size}"] = gap
        row["times"][str(batch_size)] = interleaved(calls, repeats=repeats)
    batch_size = max(batch_sizes)
    layers = report_layers(
        networks["dense"], networks["budget 0.25 by 8"], shape, latency_batch=batch_size
    )
    row["layers"] = [vars(layer) for layer in layers]
    row |= _bench_compressing(
        *networks["dense"], images[:2], against_torch=against_torch
    )
    return row


def format_tucker(row: dict[str, Any]) -> str:
    """Returns a row's medians as lines."""
    lines = [
        f"{row['model']}: {key}, {network['share']:.3f} of the MACs, "
        f"{network['params']:,} parameters"
        for key, network in row["networks"].items()
    ]
    timed = []
    for batch_size, times in row["times"].items():
        dense = times["dense, JAX"]["median_ms"]
        for name, found in times.items():
            median, size = found["median_ms"], f"  batch {batch_size}"
            timed.append([size, name, f"{median:.2f} ms", f"{dense / median:.2f}x"])
    lines.append(aligned(timed, left=2))
    lines.append(f"layers at budget 0.25 by 8, batch {max(map(int, row['times']))}:")
    lines.append(format_layers([LayerReport(**layer) for layer in row["layers"]]))
    seconds = row["compressing_s"]
    lines.append(
        "compressing at ratio 0.2: "
        + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    )
    if "gap_to_tensorly" in row:
        gap = row["gap_to_tensorly"]
        lines.append(f"logits, relative to TensorLy's factors in PyTorch: {gap:.0e}")
    return "\n".join(lines)


def _jax_call(model: Any, variables: Any, images: np.ndarray) -> Callable[[], Any]:
    apply = jax.jit(lambda variables, x: model.apply(variables, x))
    on_device = jax.device_put(images)
    return lambda: jax.block_until_ready(apply(variables, on_device))


def torch_call(
    model: Any,
    variables: Any,
    images: np.ndarray,
    *,
    fold: bool = False,
    changed: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[], Any]:
    """Returns PyTorch's evaluation of the same factorised network, channels last.

    Args:
        model: The network.
        variables: The network's weights, which PyTorch's network gets.
        images: Inputs of every call [n, h, w, c].
        fold: Whether PyTorch's own folding merges BatchNorm into the convolutions.
        changed: Entries of PyTorch's state dict that replace the network's own.
    """
    with needs_torch():
        import torch
    from train.benchmark.torch_models import TORCH_MODELS, factorised, fold_batch_norm

    options = {"stem": model.stem} if hasattr(model, "stem") else {}
    twin = TORCH_MODELS[type(model).__name__.lower()]
    module = twin(model.num_classes, width=model.width, **options)
    module = factorised(module, model.plan)
    state = {k: torch.from_numpy(v) for k, v in to_torch(model, variables).items()}
    module.load_state_dict({**state, **changed}, strict=False)
    module.eval()
    if fold:
        fold_batch_norm(module)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return call


def tensorly_factors(sites: Mapping[str, Site], plan: Plan) -> dict[str, Any]:
    """Returns TensorLy's HOSVD of the kernels that a plan factorises, in PyTorch.

    Returns:
        Entries of the state dict of the network that `factorised` makes.
    """
    with needs_torch("TensorLy"):
        import tensorly
        import torch
        from tensorly.decomposition import partial_tucker
    state = {}
    for path, site in sites.items():
        spec = plan.spec(path)
        if isinstance(spec, Tucker2):
            kernel = torch.tensor(site.kernel).permute(3, 2, 0, 1).contiguous()
            with tensorly.backend_context("pytorch"):
                (core, (u_out, u_in)), _ = partial_tucker(
                    kernel,
                    rank=[spec.rank_out, spec.rank_in],
                    modes=[0, 1],
                    init="svd",
                    # Each iteration would be one of HOOI; HOSVD takes none.
                    n_iter_max=0,
                )
            layer = torch_key((*path.split("/"), "kernel")).removesuffix("weight")
            state[f"{layer}0.weight"] = u_in.T[:, :, None, None]
            state[f"{layer}1.weight"] = core
            state[f"{layer}2.weight"] = u_out[:, :, None, None]
    return state


def _bench_compressing(
    model: Any, variables: Any, images: np.ndarray, *, against_torch: bool
) -> dict[str, Any]:
    """Returns seconds that compressing takes: with compilation, and again.

    With `against_torch`, TensorLy factorises the same kernels at the same ranks, too,
    and the row says how far the logits of our network are from those of a network in
    PyTorch that has TensorLy's factors.
    """
    seconds = {}
    jax.clear_caches()
    for name in ("with compilation", "again"):
        start = time.perf_counter()
        ours = compress(model, variables, ranks=Ratio(0.2))
        jax.block_until_ready(ours[1])
        seconds[name] = time.perf_counter() - start
    row: dict[str, Any] = {"compressing_s": seconds}
    if against_torch:
        sites = find_sites(model, variables, images.shape[1:])
        for name in ("TensorLy", "TensorLy again"):
            start = time.perf_counter()
            theirs = tensorly_factors(sites, ours[0].plan)
            seconds[name] = time.perf_counter() - start
        call = torch_call(ours[0], ours[1], images, changed=theirs)
        row["gap_to_tensorly"] = relative_gap(_jax_call(*ours, images)(), call())
    return row
