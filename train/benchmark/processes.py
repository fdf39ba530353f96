"""Steps of one, two and four real processes, and what they send each other.

`python -m train.benchmark.processes --out FILE` measures. Each process has one CPU
device. In turn, all of them time a step of their own, a step together, and all-reduces
of arrays of several sizes. The time of a ring, `2 (n-1)/n bytes / bandwidth + 2 (n-1)
latency`, is fitted to all of the all-reduces.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from train.benchmark.timing import Calls, times_in_turn
from train.config import Config, Data, Model, Optimizer
from train.data.sets import ImageSet
from train.data.split import Split
from train.fit.trainer import Trainer
from train.machine.parallel import AXIS, Parallel
from train.machine.platform import choose_cpu_flags
from train.run.directory import describe_machine
from train.run.outputs import write_json

_WIDTHS = (0.25, 1.0)
_PER_DEVICE = 16
_SIZES = (2**16, 2**18, 2**20, 2**22)  # numbers in float32


def _data(num_images: int) -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(num_images, 28, 28, 1), dtype=np.uint8)
    split = Split(images, rng.integers(10, size=num_images).astype(np.int32))
    return ImageSet("synthetic", split, split, tuple(map(str, range(10))))


def _step(width: float, devices: list[Any]) -> tuple[Trainer, Callable[[], Any]]:
    batch_size = _PER_DEVICE * len(devices)
    config = Config(
        batch_size=batch_size,
        data=Data(source="synthetic", mean=(0.5,), std=(0.25,)),
        model=Model(name="lenet", width=width),
        optimizer=Optimizer(learning_rate=0.01),
    )
    trainer = Trainer(config, _data(batch_size), devices)
    inputs = next(trainer.inputs(0, 0))
    state = trainer.init_state()

    def call() -> Any:
        nonlocal state
        state, totals = trainer.train_call(state, inputs)
        return state, totals

    return trainer, call


def _reduction(size: int) -> Callable[[], Any]:
    parallel = Parallel("pmap", tuple(jax.devices()))
    reduce = parallel.wrap(lambda x: lax.psum(x, AXIS), (True,))
    array = parallel.spread(np.ones((parallel.num_devices, size), np.float32))
    return lambda: reduce(array)


def _measure(repeats: int) -> dict[str, Any]:
    calls: Calls = {}
    networks = {}
    for width in _WIDTHS:
        _, calls[f"alone {width}"] = _step(width, jax.local_devices())
        trainer, calls[f"together {width}"] = _step(width, jax.devices())
        leaves = jax.tree.leaves(trainer.abstract_state().params)
        params = sum(leaf.size for leaf in leaves)
        # Gradients in float32, and four sums of the metrics.
        networks[str(width)] = {"params": params, "bytes": 4 * params + 16}
    if jax.process_count() > 1:
        calls |= {f"reduce {size}": _reduction(size) for size in _SIZES}

    def before(name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    times = times_in_turn(calls, repeats=repeats, before=before)
    return {
        "num_processes": jax.process_count(),
        "median_ms": {n: statistics.median(values) for n, values in times.items()},
        "quartiles_ms": {
            n: statistics.quantiles(values, n=4)[::2] for n, values in times.items()
        },
        "networks": networks,
    }


def _terms(num_processes: int, num_bytes: float) -> tuple[float, float]:
    n = num_processes
    return 2 * (n - 1) / n * num_bytes, 2.0 * (n - 1)


def _fit(rows: list[dict[str, Any]]) -> np.ndarray:
    """Returns milliseconds a byte and a message, of the least relative error."""
    terms, times = [], []
    for row in rows:
        for size in _SIZES if row["num_processes"] > 1 else ():
            terms.append(_terms(row["num_processes"], 4 * size))
            times.append(row["median_ms"][f"reduce {size}"])
    weighed = np.asarray(terms) / np.asarray(times)[:, None]
    return np.linalg.lstsq(weighed, np.ones(len(times)))[0]


def _run(num_processes: int, repeats: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", __spec__.name, "--repeats", str(repeats)]
    command += ["--worker", address, str(num_processes)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(index)], stdout=subprocess.PIPE, text=True, env=env
        )
        for index in range(num_processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a process failed; its output says why.")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    """Measures, prints a table, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats (={args.repeats}) must be >= 2, for quartiles")
    if args.worker:
        choose_cpu_flags()
        address, count, index = args.worker
        if int(count) > 1:
            jax.distributed.initialize(address, int(count), int(index))
        print(json.dumps(_measure(args.repeats)))
        return
    rows = [_run(count, args.repeats) for count in (1, 2, 4)]
    per_byte, per_message = _fit(rows)
    speed, latency = 1e-3 / per_byte, 1e3 * per_message
    print(f"fitted: {speed:,.0f} MB/s, {latency:,.0f} us a message")
    for row in rows:
        row["predicted_ms"] = {}
        for width, network in row["networks"].items():
            alone, together = (
                row["median_ms"][f"{how} {width}"] for how in ("alone", "together")
            )
            per_step = _terms(row["num_processes"], network["bytes"])
            predicted = alone + per_step[0] * per_byte + per_step[1] * per_message
            row["predicted_ms"][width] = predicted
            print(
                f"{row['num_processes']} processes, {network['bytes'] / 1e6:.2f} MB: "
                f"alone {alone:.1f} ms, together {together:.1f} ms, predicted "
                f"{predicted:.1f} ms"
            )
    record = {
        **describe_machine(),
        "command": f"python -m {__spec__.name} --out {shlex.quote(args.out)}",
        "batch_per_device": _PER_DEVICE,
        "repeats": args.repeats,
        "model": "lenet",
        "fit": {"MB_per_s": speed, "us_per_message": latency},
        "rows": rows,
    }
    write_json(args.out, record)


if __name__ == "__main__":
    main()
