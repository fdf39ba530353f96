"""Batches for the devices: a set that lies on them whole, or streams through.

In both cases a call gets images, labels and indices into them, so the compiled step and
its randomness are the same.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.data import Split
from train.keys import run_keys
from train.machine.parallel import Parallel

# Most steps in a call on GPU and TPU; on CPU a call has one.
_STEPS_PER_CALL = 100
# Bytes of a chunk on each device; two chunks are in memory at once.
_STREAMED_BYTES = 2**28


def epoch_order(
    seed: int, epoch: int, *, num_examples: int, batch_size: int
) -> np.ndarray:
    """Returns the examples of an epoch, shuffled, [steps, batch_size].

    The last partial batch is dropped.
    """
    key = jax.random.fold_in(run_keys(seed).order, epoch)
    order = np.asarray(jax.random.permutation(key, num_examples))
    steps = num_examples // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def in_order(num_examples: int, batch_size: int) -> np.ndarray:
    """Returns all examples in order, [steps, batch_size], the last batch padded.

    Padding repeats example 0; the caller drops what comes after `num_examples`.
    """
    steps = -(-num_examples // batch_size)
    order = np.zeros(steps * batch_size, np.int32)
    order[:num_examples] = np.arange(num_examples)
    return order.reshape(steps, batch_size)


@dataclasses.dataclass(frozen=True)
class Feed:
    """Gives a split's images to the devices.

    `resident` is the whole split on every device, or None if it streams.
    """

    split: Split
    parallel: Parallel
    resident: tuple[jax.Array, jax.Array] | None

    @property
    def spread(self) -> tuple[bool, bool, bool]:
        """Whether images, labels and indices are spread over the devices."""
        streams = self.resident is None
        return (streams, streams, True)

    def calls(
        self, order: np.ndarray, steps_per_call: int
    ) -> Generator[Any, None, None]:
        """Yields images, labels and indices, one call ahead of their use.

        Args:
            order: Examples [steps, batch]; the batch is split over the devices.
            steps_per_call: Rows of `order` in a call; the last call may have fewer.
        """
        pending: list[concurrent.futures.Future[Any]] = []
        # A thread works one call ahead: it reads host memory while devices compute.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for start in range(0, len(order), steps_per_call):
                rows = order[start : start + steps_per_call]
                pending.append(pool.submit(self._put, rows))
                if len(pending) > 1:
                    yield pending.pop(0).result()
            for last in pending:
                yield last.result()

    def _put(self, rows: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        devices = self.parallel.num_devices
        # [devices, steps, batch / devices]: row i is what device i computes.
        indices = rows.reshape(len(rows), devices, -1).swapaxes(0, 1).astype(np.int32)
        if self.resident is not None:
            return (*self.resident, self.parallel.spread(indices))
        # Each process reads and holds only the images of its own devices.
        own = indices[[*self.parallel.own]]
        examples = own.reshape(len(own), -1)
        images = np.empty((*examples.shape, *self.split.images.shape[1:]), "u1")
        for row, chosen in zip(images, examples, strict=True):
            row[...] = self.split.images[chosen]
        labels = self.split.labels[examples]
        places = np.arange(examples.shape[1], dtype=np.int32).reshape(own.shape[1:])
        places = np.broadcast_to(places, own.shape)
        return self.parallel.spread_own((images, labels, places))


def make_feed(split: Split, parallel: Parallel, *, memory_share: float) -> Feed:
    """Puts a split on every device if it takes at most `memory_share` of its memory."""
    resident = None
    memory = _device_memory_bytes(parallel)
    if jax.process_count() > 1:
        # All processes must choose the same, though machines may differ in memory.
        memory = float(multihost_utils.process_allgather(np.float32(memory)).min())
    if split.images.nbytes <= memory_share * memory:
        resident = parallel.replicate((np.asarray(split.images), split.labels))
    return Feed(split, parallel, resident)


def _device_memory_bytes(parallel: Parallel) -> float:
    """Returns the memory of one device; on CPU its share of the host's."""
    devices = parallel.mesh.local_devices
    stats: dict[str, int] = devices[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", host / len(devices))


def choose_steps_per_call(
    feed: Feed, *, asked: int | None, steps_per_epoch: int, batch_size: int
) -> int:
    """Returns the steps of a compiled call.

    Args:
        feed: The training images; if they stream, a call's memory is bounded.
        asked: The configured number; None: a number that suits the platform.
        steps_per_epoch: Steps of an epoch of the run.
        batch_size: Images a step, on all devices.
    """
    platform = feed.parallel.devices[0].platform
    most = asked or (1 if platform == "cpu" else _STEPS_PER_CALL)
    if feed.resident is None:
        step_bytes = batch_size * feed.split.images[0].nbytes
        held = _STREAMED_BYTES * feed.parallel.num_devices // step_bytes
        most = min(most, max(1, held))
    return most if asked else even_calls(steps_per_epoch, most)


def even_calls(steps_per_epoch: int, most: int) -> int:
    """Returns the most steps a call, up to `most`, that an epoch has a whole number of.

    A shorter last call is a program of its own, which takes as long to compile. Where
    only calls shorter than a quarter of `most` would avoid it, it is accepted, and the
    answer is `most`.
    """
    sizes = range(1, min(most, steps_per_epoch) + 1)
    even = max(size for size in sizes if steps_per_epoch % size == 0)
    return even if even == steps_per_epoch or 4 * even >= most else most
