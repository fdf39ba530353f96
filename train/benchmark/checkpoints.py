"""Timing of checkpoints' networks as they are deployed, in JAX and other programs."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from inertia_jax.calls import Network, same_keys
from inertia_jax.cost.table import aligned
from inertia_jax.differences import differing_from
from inertia_jax.metadata import both_sides
from inertia_jax.ops.inertial.settings import near_miss
from inertia_jax.plan.plan import plan_of, without_ladders
from train.benchmark.runtimes import (
    RUNTIMES,
    check_installed,
    runtime_call,
    runtime_versions,
)
from train.benchmark.suite import BaseSuite
from train.benchmark.timing import Calls, interleaved, jax_call, relative_gap
from train.config import FINETUNE, FactoryOption, SourceOption
from train.data import ImageSet, Split
from train.data.augment import Augmentation
from train.errors import UsageError, user_input
from train.evaluate.checkpoint import load_fitting
from train.evaluate.deployed import deployed, images_to_logits
from train.evaluate.settings import EvaluationSettings
from train.export.comparison import random_input
from train.fit.trainer import Trainer
from train.machine.processes import say
from train.machine.waiting import waiting
from train.networks import (
    TrainedNetwork,
    cost_in_words,
    from_checkpoint,
    name_in_words,
    read_network,
    with_dtype,
)
from train.own_network import OwnNetwork
from train.run.checkpoints import find_checkpoint, manifest_sha256
from train.step.train_step import gate_rates

_PROGRAMS = {"jax": "JAX", **RUNTIMES}
_WHAT = {"forward": "", "train": ", step"}


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Times your own networks as they are deployed, with BatchNorm folded.

    Checkpoints come before the options. All networks and programs take turns, on
    images that lie on the device. Ratios are to the first network in JAX.
    """

    checkpoints: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CHECKPOINT [CHECKPOINT ...]"),
    ] = ()
    """Checkpoints, or runs, of which the best checkpoint is taken."""
    against: tuple[str, ...] = ()
    """Programs in which every network is timed, too, as `export` writes it: torch, onnx
    (ONNX Runtime), openvino. Any other word is one more checkpoint."""
    batch_sizes: tuple[int, ...] = (1, 64)
    """Numbers of images a call."""
    train: bool = False
    """Time a step of training, too, as `finetune` takes it, on one device."""
    repeats: int = 9
    """Number of timed calls of each function."""
    image_size: int | tuple[int, int] | None = None
    """Height and width of the input; one number: both; None: as the checkpoints say."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation in JAX; None: the checkpoints'. Other programs have
    float32."""
    data: SourceOption = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits, whose first test images are
    timed, resized to fit; None: random ones, which open other gates of inertial layers
    than images do."""
    factory: FactoryOption = None
    """What makes networks of your own, as MODULE:FUNCTION; None: as the checkpoints
    say."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise UsageError("`benchmark --suite checkpoints` needs a checkpoint.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"`batch_sizes` (={self.batch_sizes}) must be >= 1.")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times the networks at each batch size, prints the times and yields them.

        Yields:
            A row for each network, program and number of images: the facts of the
            network; `what` is timed, `forward` or `train`; `median_ms`, `min_ms` and
            `max_ms`; `images_per_s`; `speedup`, the first row's time over this one's;
            and `gap`, the largest difference from the logits in JAX in float32, before
            BatchNorm is folded, over the largest logit. What a program cannot take has
            `refused` instead, which says why.
        """
        for program in self._programs:
            check_installed(program)
        first, *others = map(find_checkpoint, self.checkpoints)
        for word in self.against:
            if word in RUNTIMES:
                continue
            if not pathlib.Path(word).expanduser().exists():
                raise UsageError(
                    f"`against` (={word}) must be {', '.join(RUNTIMES)}, or a "
                    f"checkpoint.{near_miss(word, RUNTIMES)}"
                )
            others.append(find_checkpoint(word))
        with user_input():
            networks = [read_network(first, factory=self.factory)]
            networks += [read_network(p, fallback=self.factory) for p in others]
            with waiting("counting MACs"):
                subjects = [self._subject(network) for network in networks]
            for subject in subjects:
                print(subject.in_words(), flush=True)
            for batch_size in dict.fromkeys(self.batch_sizes):
                rows = self._measure(subjects, batch_size)
                print(f"\nbatch {batch_size}\n{_format(rows)}", flush=True)
                yield from rows

    def machine(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        machine = super().machine(rows)
        machine["versions"] |= runtime_versions(self._programs)
        return machine

    @property
    def _programs(self) -> list[str]:
        return [word for word in dict.fromkeys(self.against) if word in RUNTIMES]

    def _subject(self, network: TrainedNetwork) -> "_Subject":
        if self.image_size is not None:
            preprocessing = network.preprocessing
            shape = (*both_sides(self.image_size), preprocessing.image_shape[2])
            network = dataclasses.replace(
                network,
                preprocessing=dataclasses.replace(
                    preprocessing, image_shape=shape, resize=None
                ),
            )
            differing = differing_from(network.model, network.variables, shape)
            if differing:
                raise UsageError(
                    f"`image_size` (={self.image_size}) does not suit {network.path}: "
                    f"{differing}."
                )
        if self.dtype is not None:
            model = with_dtype(network.model, jnp.dtype(self.dtype))
            network = dataclasses.replace(network, model=model)
        return _Subject(network, self._pixels(network))

    def _pixels(self, network: TrainedNetwork) -> np.ndarray:
        """Returns images [n, h, w, c] in uint8, as many as the largest batch has."""
        size, (*_, channels) = max(self.batch_sizes), network.preprocessing.image_shape
        sides = network.preprocessing.resized_sides
        if self.data is None:
            return random_input((size, *sides, channels), "uint8")
        test = load_fitting(network, self.data, EvaluationSettings(resize=True)).test
        if len(test) < size:
            raise UsageError(
                f"`batch_sizes` (={self.batch_sizes}) must be at most {len(test)}, the "
                f"test images of {self.data}."
            )
        return np.asarray(test.images[:size])

    def _measure(
        self, subjects: Sequence["_Subject"], batch_size: int
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        calls: Calls = {}
        for subject in subjects:
            say(f"compiling {subject.network.path}, batch {batch_size}")
            images = subject.images[:batch_size]
            expected = jax_call(subject.unfolded(), images)()
            for program in ("jax", *self._programs):
                row = {**subject.facts, "what": "forward", "program": program}
                rows.append(row | {"batch_size": batch_size})
                try:
                    call = subject.call(program, images)
                except ValueError as error:
                    if program == "jax":
                        raise
                    rows[-1]["refused"] = str(error)
                    continue
                rows[-1]["gap"] = relative_gap(call(), expected)
                calls[str(len(rows) - 1)] = call
            if self.train:
                calls[str(len(rows))] = subject.train_call(batch_size)
                row = {**subject.facts, "what": "train", "program": "jax"}
                rows.append(row | {"batch_size": batch_size})
        say(f"timing {len(calls)} functions in turn, batch {batch_size}")
        for place, spread in interleaved(calls, repeats=self.repeats).items():
            row, median = rows[int(place)], spread["median_ms"]
            row |= {**spread, "images_per_s": 1e3 * batch_size / median}
            # The first of its kind, which was timed before.
            base = next(r for r in rows if r["what"] == row["what"])
            row["speedup"] = base["median_ms"] / median
        return rows


class _Subject:
    """A network that is timed, and what stands in each of its rows.

    Attributes:
        network: The network.
        images: Its input [n, h, w, c].
        facts: `checkpoint` and `sha256` of its manifest, `network`, `image_shape`,
            `dtype`, `params`, `macs` (at the gate rates of these images) and
            `num_bytes`, those of the deployed weights.
    """

    def __init__(self, network: TrainedNetwork, pixels: np.ndarray) -> None:
        self.network = network
        self._pixels = pixels
        preprocessing, model = network.preprocessing, network.model
        plain = Augmentation.plain(preprocessing, jnp.float32)
        # A copy, since PyTorch warns of arrays that it may not write to.
        self.images = np.array(plain.for_evaluation(jnp.asarray(pixels)))
        dtype = jnp.dtype(model.dtype).name
        self._deployed = deployed(network, dtype, fold=True)
        leaves = jax.tree.leaves(self._deployed[1])
        self._cost = network.cost(self._gate_rates())
        self.facts = {
            "checkpoint": str(network.path),
            "sha256": manifest_sha256(network.path),
            "network": name_in_words(model),
            "image_shape": list(preprocessing.image_shape),
            "dtype": dtype,
            "params": self._cost.params,
            "macs": self._cost.total_macs,
            "num_bytes": sum(leaf.nbytes for leaf in leaves),
        }

    def in_words(self) -> str:
        facts = self.facts
        shape = "x".join(map(str, facts["image_shape"]))
        size = f"{facts['num_bytes'] / 1e6:.2f} MB of weights in {facts['dtype']}"
        costs = f"{cost_in_words(self._cost)}, {size}"
        return f"{facts['checkpoint']}: {facts['network']}, input {shape}\n  {costs}"

    def unfolded(self) -> Callable[[Any], Any]:
        """Returns the network before BatchNorm is folded, in float32."""
        model = without_ladders(self.network.model)
        if not isinstance(model, OwnNetwork):  # which may have no other type
            model = with_dtype(model, jnp.float32)
        return self._logits(model, self.network.variables)

    def call(self, program: str, images: np.ndarray) -> Callable[[], Any]:
        """Returns the call of the deployed network.

        Raises:
            ValueError: The program cannot take it.
        """
        if program == "jax":
            return jax_call(self._logits(*self._deployed), images)
        model, variables = self._in_float32

        def function(variables: Any, images: Any) -> Any:
            return self._logits(model, variables)(images)

        return runtime_call(program, function, variables, images)

    @functools.cached_property
    def _in_float32(self) -> Network:
        """The deployed network as other programs have it."""
        return deployed(self.network, "float32", fold=True)

    def train_call(self, batch_size: int) -> Callable[[], Any]:
        """Returns the call of a step of training, which goes on with its own result."""
        network = self.network
        config = from_checkpoint(FINETUNE, network, keep_data=False)
        config = dataclasses.replace(
            config,
            batch_size=batch_size,
            steps_per_call=1,
            data=dataclasses.replace(
                config.data, image_size=network.preprocessing.image_shape[:2]
            ),
        )
        count = network.model.num_classes
        labels = (np.arange(batch_size) % count).astype(np.int32)
        split = Split(self._pixels[:batch_size], labels)
        names = network.class_names or tuple(map(str, range(count)))
        data = ImageSet("images", split, split, names)
        trainer = Trainer(config, data, jax.devices()[:1])
        state, inputs = trainer.init_state(), next(trainer.inputs(0, 0))

        def step() -> Any:
            nonlocal state
            state, totals = trainer.train_call(state, inputs)
            return state, totals

        return step

    def _logits(self, model: Any, variables: Any) -> Callable[[Any], Any]:
        return images_to_logits(model, variables, self.network.preprocessing, "float32")

    def _gate_rates(self) -> dict[str, float]:
        """Returns each inertial layer's share of open gates on the images."""
        plan, model = plan_of(self.network.model), without_ladders(self.network.model)
        if plan is None or not plan.inertial:
            return {}

        @jax.jit
        def rates(images: Any) -> Any:
            rngs = same_keys(jax.random.key(0))
            _, sown = model.apply(
                self.network.variables, images, rngs=rngs, mutable=["intermediates"]
            )
            return gate_rates(sown["intermediates"])

        return {path: float(rate.mean()) for path, rate in rates(self.images).items()}


def _format(rows: Sequence[dict[str, Any]]) -> str:
    lines, refused = [], []
    for row in rows:
        program = f"{_PROGRAMS[row['program']]}{_WHAT[row['what']]}"
        if "refused" in row:
            refused.append(f"{row['checkpoint']}, {program}: {row['refused']}")
            continue
        line = [row["checkpoint"], program, f"{row['median_ms']:.2f} ms"]
        line += [f"({row['min_ms']:.2f} to {row['max_ms']:.2f})"]
        line += [f"{row['images_per_s']:,.0f} images/s", f"{row['speedup']:.2f}x"]
        line += [f"gap {row['gap']:.1e}"] if "gap" in row else []
        lines.append(line)
    return "\n".join([aligned(lines, left=2), *refused])
