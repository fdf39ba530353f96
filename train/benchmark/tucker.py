"""Timing of Tucker-2 networks and of compressing them, beside PyTorch and TensorLy."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

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
from inertia_jax.calls import Network
from inertia_jax.compression.sites import Site, find_sites
from inertia_jax.cost.table import aligned
from inertia_jax.models.create import abstract_variables, input_shape, model_name
from inertia_jax.ops.tucker.unfold import max_ranks
from inertia_jax.plan.specs import LowRank, Tucker2
from inertia_jax.weights.layout import torch_key
from train.benchmark.suite import NetworkSuite
from train.benchmark.timing import Calls, interleaved, random_images, relative_gap
from train.compress.layer_report import LayerReport, format_layers, report_layers
from train.errors import UsageError, needs_torch

RULES: dict[str, dict[str, Any]] = {
    "ratio 0.2": {"ranks": Ratio(0.2)},
    "budget 0.25": {"ranks": Budget(macs=0.25)},
    # Vector units are faster at multiples of 8: 17 channels take longer than 24.
    "budget 0.25 by 8": {"ranks": Budget(macs=0.25), "round_to": 8},
}


def check_budgets(model: nn.Module, rules: Iterable[str]) -> None:
    """Checks, without drawing any weights, that a network can keep to the budgets.

    Args:
        model: The network.
        rules: The rules by which it is to be compressed, some of `RULES`.

    Raises:
        UsageError: It is too narrow: even with the least ranks it takes more.
    """
    shape = input_shape(model)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_variables(model, shape)
    )
    sites = list(find_sites(model, zeros, shape).values())[1:]  # the stem stays
    total = count_cost(model, shape).macs
    for name in rules:
        rule = RULES[name]
        if not isinstance(rule["ranks"], Budget):
            continue
        least = total + sum(
            min(0, _least_macs(site, rule.get("round_to", 1)) - site.macs(site.spec))
            for site in sites
        )
        if least > rule["ranks"].share * total:
            raise UsageError(
                f"`width` (={model.width}) is too small for this suite, which "
                f"compresses {model_name(model)} by {name}: with the least ranks the "
                f"network still takes {least / total:.3f} of its MACs."
            )


def _least_macs(site: Site, round_to: int) -> int:
    """Returns the MACs of a convolution with the least ranks, multiples of a number."""
    most_in, most_out = max_ranks(site.kernel.shape, groups=site.groups)
    rank_in, rank_out = min(round_to, most_in), min(round_to, most_out)
    if site.is_pointwise:
        return site.macs(LowRank(min(rank_in, rank_out)))
    return site.macs(Tucker2(rank_in, rank_out))


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Compressed networks beside dense ones, at batch 1 and at `batch_size`.

    With `--against torch`, TensorLy factorises the same kernels, too.
    """

    stem: Literal["cifar", "imagenet"] = "cifar"
    """Stem of resnet18; imagenet: torchvision's, 1,000 classes at 224 x 224."""
    repeats: int = 9
    """Number of timed calls of each function."""

    def cases(self) -> Iterable[str]:
        if self.stem != "cifar" and self.models != ("resnet18",):
            raise UsageError(f"`stem` (={self.stem}) is for `models` (=resnet18).")
        for name in self.models:
            check_budgets(self._model(name), RULES)
        return self.models

    def _model(self, name: str) -> nn.Module:
        classes = 1000 if self.stem == "imagenet" else 10
        return create_model(name, width=self.width, stem=self.stem, num_classes=classes)

    def measure(self, case: str) -> dict[str, Any]:
        """Times a network's evaluation, its layers' calls, and its compression.

        Weights are random: a trained network has other ranks under the same budget, but
        they cost the same. Layers are timed at the largest batch.
        """
        model = self._model(case)
        dense = (model, init_variables(model, jax.random.key(0)))
        shape = input_shape(model)
        networks: dict[str, Network] = {"dense": dense}
        networks |= {key: compress(*dense, **rule) for key, rule in RULES.items()}
        dense_macs = count_cost(model, shape).macs
        row: dict[str, Any] = {"model": case, "stem": self.stem, "width": self.width}
        row |= {"networks": {}, "times": {}}
        for key, network in networks.items():
            cost = count_cost(network[0], shape)
            share = cost.macs / dense_macs
            counts = {"params": cost.params, "macs": cost.macs, "share": share}
            row["networks"][key] = counts
        for batch_size in self.both_batches:
            images = random_images(batch_size, shape)
            calls: Calls = {
                f"{key}, JAX": _jax_call(*network, images)
                for key, network in networks.items()
            }
            if "torch" in self.frameworks:
                for key, network in networks.items():
                    calls[f"{key}, PyTorch"] = call = torch_call(*network, images)
                    gap = relative_gap(call(), calls[f"{key}, JAX"]())
                    row["networks"][key][f"gap_to_torch_batch_{batch_size}"] = gap
            row["times"][str(batch_size)] = interleaved(calls, repeats=self.repeats)
        small = networks["budget 0.25 by 8"]
        layers = report_layers(dense, small, shape, latency_batch=batch_size)
        row["layers"] = [vars(layer) for layer in layers]
        against_torch = "torch" in self.frameworks
        return row | _bench_compressing(*dense, images[:2], against_torch=against_torch)

    def describe(self, row: dict[str, Any]) -> str:
        lines = [
            f"{row['model']}: {key}, {network['share']:.3f} of the MACs, "
            f"{network['params']:,} parameters"
            for key, network in row["networks"].items()
        ]
        timed = []
        for batch_size, times in row["times"].items():
            dense = times["dense, JAX"]["median_ms"]
            for name, spread in times.items():
                median, size = spread["median_ms"], f"  batch {batch_size}"
                timed.append([size, name, f"{median:.2f} ms", f"{dense / median:.2f}x"])
        seconds = row["compressing_s"].items()
        lines += [
            aligned(timed, left=2),
            f"layers at budget 0.25 by 8, batch {max(map(int, row['times']))}:",
            format_layers([LayerReport(**layer) for layer in row["layers"]]),
            "compressing at ratio 0.2: "
            + ", ".join(f"{name} {value:.2f} s" for name, value in seconds),
        ]
        if "gap_to_tensorly" in row:
            gap = row["gap_to_tensorly"]
            lines += [f"logits, relative to TensorLy's factors in PyTorch: {gap:.0e}"]
        return "\n".join(lines)


def _jax_call(model: Any, variables: Any, images: np.ndarray) -> Callable[[], Any]:
    return functools.partial(jax.jit(model.apply), variables, jax.device_put(images))


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
    from train.benchmark.runtimes import module_call
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
    return module_call(module, images)


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
                    # Iterations are those of HOOI; HOSVD has none.
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
    """Times compressing, and TensorLy at the same ranks, whose logits are compared."""
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
