"""Timing of training steps and evaluations, beside PyTorch's."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inertia_jax import count_cost, create_model, init_variables
from inertia_jax.cost.table import aligned
from train.benchmark.suite import NetworkSuite
from train.benchmark.timing import interleaved, measure_peak_gflops
from train.errors import needs_torch

_RECIPE = {"learning_rate": 0.1, "momentum": 0.9}
_WEIGHT_DECAY = 5e-4
_SHAPE = (32, 32, 3)

Functions = dict[str, dict[str, Callable[[], None]]]


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Training steps and evaluations of networks at 32 x 32."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32."""
    repeats: int = 9
    """Timed calls of each."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times each network, and sets it against a product of two matrices."""
        peak = measure_peak_gflops(self.dtype)
        print(f"product of two large matrices: {peak:,.0f} GFLOP/s")
        yield from self.each_model(
            bench_model,
            format_model,
            batch_size=self.batch_size,
            repeats=self.repeats,
            dtype=self.dtype,
            peak_gflops=peak,
        )


def bench_model(
    name: str,
    *,
    batch_size: int,
    repeats: int,
    width: float,
    against_torch: bool,
    dtype: Literal["float32", "bfloat16"],
    peak_gflops: float,
) -> dict[str, Any]:
    """Times a training step and an evaluation of a network at 32 x 32.

    The step is forward, backward and SGD with momentum and weight decay, on one device,
    on a batch already there.

    Args:
        name: The network's name.
        batch_size: Images a step.
        repeats: Timed calls of each.
        width: The network's width.
        against_torch: Whether PyTorch is timed in turn, at its best: channels_last,
            compiled on a GPU.
        dtype: Type of the computation; parameters are float32.
        peak_gflops: What `measure_peak_gflops` found.
    """
    kinds: tuple[Literal["jax", "torch"], ...] = ("jax",)
    if against_torch:
        kinds = ("jax", "torch")
    functions = make_functions(
        name, batch_size=batch_size, width=width, kinds=kinds, dtype=dtype
    )
    macs = count_cost(create_model(name, width=width), _SHAPE).macs
    row = {"model": name, "batch_size": batch_size, "width": width, "dtype": dtype}
    row["peak_gflops"] = peak_gflops
    # The backward pass takes a product for the inputs and one for the kernels.
    for what, passes in (("train", 3), ("eval", 1)):
        times: dict[str, Any] = interleaved(functions[what], repeats=repeats)
        for found in times.values():
            seconds = found["median_ms"] / 1e3
            found["images_per_s"] = batch_size / seconds
            found["gflops"] = 2e-9 * passes * macs * batch_size / seconds
            found["share_of_peak"] = found["gflops"] / peak_gflops
        row[what] = times
    return row


def format_model(row: dict[str, Any]) -> str:
    """Returns a row's medians as a table."""
    header = ["network", "what", "batch", "JAX ms", "images/s", "of peak"]
    if "torch" in row["train"]:
        header += ["PyTorch ms", "JAX / PyTorch"]
    lines = [header]
    for what in ("train", "eval"):
        ours = row[what]["jax"]
        line = [row["model"], what, f"{row['batch_size']}", f"{ours['median_ms']:.1f}"]
        line += [f"{ours['images_per_s']:,.0f}", f"{ours['share_of_peak']:.1%}"]
        if "torch" in row[what]:
            theirs = row[what]["torch"]["median_ms"]
            line += [f"{theirs:.1f}", f"{ours['median_ms'] / theirs:.2f}"]
        lines.append(line)
    return aligned(lines, left=2)


def make_functions(
    name: str,
    *,
    batch_size: int,
    width: float,
    kinds: Sequence[Literal["jax", "torch"]],
    dtype: Literal["float32", "bfloat16"],
) -> Functions:
    """Returns a call for `train` and `eval` in each framework, which waits for its end.

    Args:
        name: The network's name.
        batch_size: Images a call.
        width: The network's width.
        kinds: The frameworks.
        dtype: Type of the computation; parameters are float32.
    """
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, *_SHAPE)).astype(np.float32)
    labels = (np.arange(batch_size) % 10).astype(np.int32)
    functions: Functions = {"train": {}, "eval": {}}
    if "jax" in kinds:
        pair = _jax_functions(name, width, images, labels, dtype)
        functions["train"]["jax"], functions["eval"]["jax"] = pair
    if "torch" in kinds:
        pair = _torch_functions(name, width, images, labels, dtype)
        functions["train"]["torch"], functions["eval"]["torch"] = pair
    return functions


def _jax_functions(
    name: str, width: float, images: np.ndarray, labels: np.ndarray, dtype: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    model = create_model(name, width=width, dtype=jnp.dtype(dtype))
    variables = init_variables(model, jax.random.key(0))
    tx = optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY),
        optax.sgd(_RECIPE["learning_rate"], _RECIPE["momentum"]),
    )

    def step(state: Any, images: Any, labels: Any) -> Any:
        params, batch_stats, opt_state = state

        def loss_fn(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return losses.mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    take_step = jax.jit(step, donate_argnums=0)
    predict = jax.jit(
        lambda params, batch_stats, images: model.apply(
            {"params": params, "batch_stats": batch_stats}, images
        )
    )
    params = variables["params"]
    state = [(params, variables["batch_stats"], tx.init(params))]
    batch = jax.device_put((images.astype(jnp.dtype(dtype)), labels))

    def train() -> None:
        state[0] = jax.block_until_ready(take_step(state[0], *batch))

    def evaluate() -> None:
        jax.block_until_ready(predict(*state[0][:2], batch[0]))

    return train, evaluate


def _torch_functions(
    name: str, width: float, images: np.ndarray, labels: np.ndarray, dtype: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    with needs_torch():
        import torch
    from train.benchmark.torch_models import TORCH_MODELS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    twin = TORCH_MODELS[name](width=width)
    twin = twin.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        twin.parameters(),
        _RECIPE["learning_rate"],
        _RECIPE["momentum"],
        weight_decay=_WEIGHT_DECAY,
    )
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long().to(device)
    # On CPU PyTorch's compiler needs one for C++, and eager calls take oneDNN already.
    forward = torch.compile(twin) if device == "cuda" else twin
    low = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def train() -> None:
        twin.train()
        optimizer.zero_grad()
        with low:
            loss = torch.nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        wait()

    def evaluate() -> None:
        twin.eval()
        with torch.no_grad(), low:
            forward(x)
        wait()

    return train, evaluate
