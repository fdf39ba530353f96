"""What a report finds out about each network: cost, accuracy, kernels, gates."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from inertia_jax import CostTable
from inertia_jax.calls import are_equal
from inertia_jax.checkpoint import load_arrays, verify_checkpoint
from inertia_jax.models.create import known_name
from train.data import ImageSet, Split
from train.errors import UsageError
from train.evaluate.checkpoint import evaluator_on, load_fitting
from train.evaluate.evaluation import Evaluation
from train.evaluate.settings import EvaluationSettings
from train.machine.processes import say, warn
from train.networks import TrainedNetwork
from train.own_network import OwnNetwork
from train.report.gate_maps import GateMaps, map_maker
from train.report.kernels import FactorisedKernel, compare_kernels
from train.report.subjects import Origin, Subject, parent_of
from train.run.checkpoints import find_checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """What is known of a subject. What could not be found out is None, or empty.

    Attributes:
        subject: The run or the checkpoint.
        source: The data that it was evaluated on.
        evaluation: Its accuracy on them.
        cost: Its parameters and MACs, at the gate rates of the evaluation.
        kernels: The layers that became factors, compared with those before.
        maps: The friction of its inertial layers on some test images.
        latency: The time of a call on this machine, by the number of images: the
            median, the least and the greatest, in milliseconds.
        cycles: The cycles of a call on a chip, as its compiler estimates them.
        left_out: The reasons why something was not found out, by what it is.
    """

    subject: Subject
    source: str | None = None
    evaluation: Evaluation | None = None
    cost: CostTable | None = None
    kernels: tuple[FactorisedKernel, ...] = ()
    maps: GateMaps | None = None
    latency: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    cycles: int | None = None
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> str:
        """The name of the network, whatever stands at its layers."""
        network = self.subject.network
        if network is None:
            return ""
        model = network.model
        if isinstance(model, OwnNetwork):
            return model.factory
        return known_name(model) or type(model).__name__

    @property
    def test_set(self) -> tuple[str, str | None] | None:
        """What tells the images of the evaluation from others."""
        if self.source is None or self.evaluation is None:
            return None
        return self.source, self.evaluation.held_out

    @property
    def top1(self) -> float | None:
        """The accuracy that was measured here, or else the one of the training."""
        if self.evaluation is not None:
            return self.evaluation.top1
        network = self.subject.network
        recorded = (network.info.get("evaluation") or {}) if network else {}
        top1 = recorded.get("top1")
        return float(top1) if isinstance(top1, int | float) else None

    @property
    def gate_rates(self) -> dict[str, float]:
        """The share of open gates of each inertial layer, by path."""
        if self.evaluation is not None:
            return dict(self.evaluation.gate_rates)
        return self.subject.network.gate_rates if self.subject.network else {}


class Examiner:
    """Examines networks one after another. Equal ones share data and programs."""

    def __init__(
        self,
        settings: EvaluationSettings,
        *,
        source: str | None = None,
        num_images: int,
    ) -> None:
        """Reads nothing yet.

        Args:
            settings: How test images are evaluated.
            source: The data; None: those that each network was trained on.
            num_images: The number of images on which friction is shown.
        """
        self._settings, self._source = settings, source
        self._num_images = num_images
        self._known: dict[Any, list[tuple[nn.Module, _Instruments]]] = {}
        self._read: dict[pathlib.Path, Mapping[str, Any]] = {}

    def examine(self, subject: Subject) -> Findings:
        """Returns what is found out about a subject.

        Raises:
            UsageError: The data that were named do not fit the network.
        """
        network = subject.network
        if network is None:
            why = "the run has saved no checkpoint"
            return Findings(subject, left_out={"network": why})
        left_out: dict[str, str] = {}
        findings = Findings(subject, left_out=left_out)
        source = self._source or network.source
        if source is None:
            left_out["data"] = "it names no data, and --data names none"
        else:
            try:
                tools = self._instruments(network, source)
            except UsageError as error:
                if self._source is not None:
                    raise
                left_out["data"] = str(error)
                warn(f"{subject.name} is not evaluated: {error}")
            else:
                findings = self._measured(findings, network, source, tools)
        self._read[network.path.absolute()] = network.variables
        cost = network.cost(findings.gate_rates)
        kernels = self._kernels(subject, cost, left_out)
        return dataclasses.replace(findings, cost=cost, kernels=kernels)

    def _measured(
        self,
        findings: Findings,
        network: TrainedNetwork,
        source: str,
        tools: "_Instruments",
    ) -> Findings:
        say(f"evaluating {findings.subject.name} on {source}")
        evaluation = tools.evaluate(network.variables)
        maps = None
        if evaluation.gate_rates and self._num_images:
            pictures = choose_pictures(tools.data.test, self._num_images)
            maps = tools.map_gates(network.variables, pictures)
        return dataclasses.replace(
            findings, source=source, evaluation=evaluation, maps=maps
        )

    def _instruments(self, network: TrainedNetwork, source: str) -> "_Instruments":
        known = self._known.setdefault(self._data_key(network, source), [])
        for model, tools in known:
            if are_equal(model, network.model):
                return tools
        data = known[0][1].data if known else None
        data = data or load_fitting(network, source, self._settings)
        evaluate = evaluator_on(network, data, self._settings)
        known.append((network.model, _Instruments(data, evaluate, map_maker(network))))
        return known[-1][1]

    def _data_key(self, network: TrainedNetwork, source: str) -> tuple[Any, ...]:
        """Returns everything that the data depend on, besides the settings."""
        trained_on = network.trained_on
        return (
            source,
            network.preprocessing,
            network.class_names,
            network.model.num_classes,
            trained_on and trained_on.image_size,
            network.held_out_of(source),
        )

    def _kernels(
        self, subject: Subject, cost: CostTable, left_out: dict[str, str]
    ) -> tuple[FactorisedKernel, ...]:
        """Compares the layers that became factors with those before, if any did."""
        made = [o for o in subject.origins if _is_factorised(o)]
        if not made:
            return ()
        before = pathlib.Path(parent_of(made[-1].info) or "").expanduser()
        try:
            dense = self._variables(find_checkpoint(before).absolute())
            small = self._variables(made[-1].path.absolute())
            return compare_kernels(dense, small, cost)
        except (UsageError, OSError, ValueError, KeyError) as error:
            left_out["kernels"] = f"the network before cannot be compared: {error}"
            return ()

    def _variables(self, path: pathlib.Path) -> Mapping[str, Any]:
        """Returns a checkpoint's variables, read once."""
        if path not in self._read:
            say(f"reading {path}")
            verify_checkpoint(path)
            self._read[path] = load_arrays(path)["variables"]
        return self._read[path]


@dataclasses.dataclass(frozen=True, eq=False)
class _Instruments:
    """Data, and the programs that measure a network on them."""

    data: ImageSet
    evaluate: Callable[[Mapping[str, Any]], Evaluation]
    map_gates: Callable[[Mapping[str, Any], Split], GateMaps]


def _is_factorised(origin: Origin) -> bool:
    compressed = origin.info.get("compressed")
    return isinstance(compressed, Mapping) and compressed.get("ranks") is not None


def short_source(source: str) -> str:
    """Returns the name of a source, without the folders that it lies in."""
    return pathlib.PurePath(source).name


def choose_pictures(test: Split, count: int) -> Split:
    """Returns the first image of each class, of as many classes as are needed.

    Where there are fewer classes, the first of the other images follow.
    """
    _, firsts = np.unique(test.labels, return_index=True)
    others = np.setdiff1d(np.arange(len(test)), firsts)
    places = np.concatenate([firsts, others])[:count]
    images = np.stack([test.images[int(place)] for place in places])
    return Split(images, np.asarray(test.labels)[places])
