"""Timing of training steps and evaluations, beside PyTorch's or those of NNX."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from inertia_jax import count_cost, create_model, init_variables
from inertia_jax.cost.table import aligned
from inertia_jax.nnx import create_model as create_nnx
from train.benchmark.suite import NetworkSuite
from train.benchmark.timing import Calls, interleaved, peak_gflops, random_images
from train.errors import needs_torch

_LEARNING_RATE, _MOMENTUM, _WEIGHT_DECAY = 0.1, 0.9, 5e-4
_SHAPE = (32, 32, 3)
Framework = Literal["jax", "torch", "nnx"]
_NAMES = {"torch": "PyTorch", "nnx": "NNX"}


@dataclasses.dataclass(frozen=True)
class Suite(NetworkSuite):
    """Training steps and evaluations of networks at 32 x 32."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32."""
    repeats: int = 9
    """Number of timed calls of each function."""
    against: Literal["none", "torch", "nnx"] = "none"  # type: ignore[assignment]  # more
    """torch: the same networks are measured in PyTorch, too, in turn. nnx: as NNX
    modules, trained by `nnx.jit` and `nnx.Optimizer`."""

    def measure(self, case: str) -> dict[str, Any]:
        """Times a training step and an evaluation of a network.

        The step is forward, backward and SGD with momentum and weight decay, on one
        device, on a batch that is already there. PyTorch runs in its fastest form:
        channels_last, and compiled on a GPU.
        """
        peak = peak_gflops(self.dtype)
        kinds: tuple[Framework, ...] = ("jax", *self._others)
        functions = {
            kind: make_functions(kind, case, self.batch_size, self.width, self.dtype)
            for kind in kinds
        }
        macs = count_cost(create_model(case, width=self.width), _SHAPE).macs
        row = {"model": case, "batch_size": self.batch_size, "width": self.width}
        row |= {"dtype": self.dtype, "peak_gflops": peak}
        # The backward pass takes a product for the inputs and one for the kernels.
        for what, passes in (("train", 3), ("eval", 1)):
            calls: Calls = {kind: pair[what] for kind, pair in functions.items()}
            times: dict[str, Any] = interleaved(calls, repeats=self.repeats)
            for spread in times.values():
                seconds = spread["median_ms"] / 1e3
                spread["images_per_s"] = self.batch_size / seconds
                spread["gflops"] = 2e-9 * passes * macs * self.batch_size / seconds
                spread["share_of_peak"] = spread["gflops"] / peak
            row[what] = times
        return row

    def describe(self, row: dict[str, Any]) -> str:
        header = ["network", "what", "batch", "JAX ms", "images/s", "of peak"]
        for other in self._others:
            header += [f"{_NAMES[other]} ms", f"JAX / {_NAMES[other]}"]
        lines = [header]
        for what in ("train", "eval"):
            ours = row[what]["jax"]
            line = [row["model"], what, f"{row['batch_size']}"]
            line += [f"{ours['median_ms']:.1f}", f"{ours['images_per_s']:,.0f}"]
            line += [f"{ours['share_of_peak']:.1%}"]
            for other in self._others:
                theirs = row[what][other]["median_ms"]
                line += [f"{theirs:.1f}", f"{ours['median_ms'] / theirs:.2f}"]
            lines.append(line)
        return aligned(lines, left=2)

    @property
    def _others(self) -> tuple[Literal["torch", "nnx"], ...]:
        return () if self.against == "none" else (self.against,)


def make_functions(
    kind: Framework,
    name: str,
    batch_size: int,
    width: float,
    dtype: Literal["float32", "bfloat16"],
) -> Calls:
    """Returns a framework's training step, `train`, and its evaluation, `eval`."""
    images = random_images(batch_size, _SHAPE)
    labels = (np.arange(batch_size) % 10).astype(np.int32)
    makers = {"jax": _jax_functions, "torch": _torch_functions, "nnx": _nnx_functions}
    train, evaluate = makers[kind](name, width, images, labels, dtype)
    return {"train": train, "eval": evaluate}


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY),
        optax.sgd(_LEARNING_RATE, _MOMENTUM),
    )


def _loss(logits: Any, labels: Any) -> Any:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _jax_functions(
    name: str, width: float, images: np.ndarray, labels: np.ndarray, dtype: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = create_model(name, width=width, dtype=jnp.dtype(dtype))
    variables = init_variables(model, jax.random.key(0))
    tx = _optimizer()

    def step(state: Any, images: Any, labels: Any) -> Any:
        params, batch_stats, opt_state = state

        def loss_fn(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return _loss(logits, labels), updated["batch_stats"]

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

    def train() -> Any:
        state[0] = take_step(state[0], *batch)
        return state[0]

    return train, lambda: predict(*state[0][:2], batch[0])


def _nnx_functions(
    name: str, width: float, images: np.ndarray, labels: np.ndarray, dtype: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    rngs = nnx.Rngs(0)
    network = create_nnx(name, width=width, dtype=jnp.dtype(dtype), rngs=rngs)
    optimizer = nnx.Optimizer(network, _optimizer(), wrt=nnx.Param)
    batch = jax.device_put((images.astype(jnp.dtype(dtype)), labels))

    @nnx.jit
    def step(network: Any, optimizer: Any, images: Any, labels: Any) -> None:
        gradient = nnx.grad(lambda network: _loss(network(images), labels))
        optimizer.update(network, gradient(network))

    predict = nnx.jit(lambda network, images: network(images, train=False))

    def train() -> Any:
        step(network, optimizer, *batch)
        return nnx.state(network)

    return train, lambda: predict(network, batch[0])


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
        _LEARNING_RATE,
        _MOMENTUM,
        weight_decay=_WEIGHT_DECAY,
    )
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long().to(device)
    # On CPU, PyTorch's compiler needs a C++ compiler, and eager calls use oneDNN.
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
