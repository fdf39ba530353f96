"""Timing of training steps and evaluations, beside PyTorch's, and of the loop."""

import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from inertia_jax import create_model, init_variables, to_torch
from train.checkpoints import Checkpoints
from train.config import Config
from train.data import ImageSet
from train.errors import UsageError
from train.loop import Meter, Trainer, make_metadata
from train.rundir import RunDirectory
from train.state import training_to_dict

_RECIPE = {"learning_rate": 0.1, "momentum": 0.9}
_WEIGHT_DECAY = 5e-4


def interleaved(
    functions: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Times functions in turn and returns medians and spreads, in milliseconds.

    In turn, because machines slow down and speed up over minutes.

    Args:
        functions: Each blocks until its work is done.
        repeats: Timed calls of each.
        warmup: Calls of each before, untimed: compilation, caches.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-warmup, repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
        }
        for name, values in times.items()
    }


def bench_model(
    name: str, *, batch_size: int, repeats: int, width: float, against_torch: bool
) -> dict[str, Any]:
    """Times a training step and an evaluation of a network at 32 x 32.

    The step is forward, backward and SGD with momentum and weight decay, on one device,
    in float32, on a batch already there.
    """
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32)
    labels = (np.arange(batch_size) % 10).astype(np.int32)
    model = create_model(name, width=width)
    variables = init_variables(model, jax.random.key(0))
    exported = to_torch(model, variables)
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
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    take_step = jax.jit(step, donate_argnums=0)
    predict = jax.jit(lambda variables, images: model.apply(variables, images))
    params = jax.tree.map(jnp.copy, variables["params"])
    batch_stats = jax.tree.map(jnp.copy, variables["batch_stats"])
    state = [(params, batch_stats, tx.init(params))]
    batch = jax.device_put((images, labels))

    def jax_train() -> None:
        state[0] = jax.block_until_ready(take_step(state[0], *batch))

    def jax_eval() -> None:
        jax.block_until_ready(predict(variables, batch[0]))

    train, evaluate = {"jax": jax_train}, {"jax": jax_eval}
    if against_torch:
        train["torch"], evaluate["torch"] = _torch_functions(
            name, width, exported, images, labels
        )
    return {
        "model": name,
        "batch_size": batch_size,
        "width": width,
        "train": interleaved(train, repeats=repeats),
        "eval": interleaved(evaluate, repeats=repeats),
    }


def _torch_functions(
    name: str, width: float, weights: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], None], Callable[[], None]]:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            "`--against torch` needs PyTorch: pip install 'inertia_jax[torch]'."
        ) from error
    from train.torch_models import TORCH_MODELS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    twin = TORCH_MODELS[name](width=width)
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    twin.load_state_dict(tensors, strict=False)
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

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def train() -> None:
        twin.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        wait()

    def evaluate() -> None:
        twin.eval()
        with torch.no_grad():
            twin(x)
        wait()

    return train, evaluate


def bench_loop(config: Config, data: ImageSet, *, steps: int, rounds: int) -> Any:
    """Times calls bare, and with input, logging, progress bar and a checkpoint.

    Each round takes the same number of steps twice: on inputs that lie ready, and with
    the loop's own feed, meter and one checkpoint, waited for. Both read the totals of
    one call while the next one runs.

    Raises:
        UsageError: More steps than an epoch has.
    """
    trainer = Trainer(config, data)
    if steps > trainer.steps_per_epoch:
        raise UsageError(
            f"`steps` (={steps}) must be at most {trainer.steps_per_epoch}, an epoch."
        )
    calls = -(-steps // trainer.steps_per_call)
    state = trainer.init_state()
    ready = next(trainer.inputs(0, 0))
    rounds_done = 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory(pathlib.Path(scratch) / "run", config, resume=False)
        directory.lock()
        directory.open(0)
        checkpoints = Checkpoints(directory.checkpoints)

        def bare() -> None:
            nonlocal state
            pending = None
            for _ in range(calls):
                state, totals = trainer.train_call(state, ready)
                if pending is not None:
                    jax.device_get(pending)
                pending = totals
            jax.device_get(pending)

        def whole() -> None:
            nonlocal state, rounds_done
            step = 0
            with tqdm(total=steps * config.batch_size, unit="img", leave=False) as bar:
                meter = Meter(directory, bar, config, step, has_gates=trainer.has_gates)
                inputs = trainer.inputs(0, 0)
                for batch in itertools.islice(inputs, calls):
                    state, totals = trainer.train_call(state, batch)
                    step += batch[2].shape[1]
                    meter.after_call(step, totals)
                meter.flush()
            rounds_done += 1
            training = training_to_dict(state)
            metadata = make_metadata(trainer, None, train_seconds=0.0)
            checkpoints.save(
                rounds_done, trainer.model, state.result, training, metadata
            )
            checkpoints.wait()

        times = interleaved({"bare": bare, "whole": whole}, repeats=rounds, warmup=1)
        directory.close()
    return {"steps": calls * trainer.steps_per_call, "rounds": rounds, **times}
