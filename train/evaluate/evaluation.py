"""Evaluation: every example exactly once, on any number of devices."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from inertia_jax.cost.table import aligned
from inertia_jax.plan.plan import without_ladders
from train.data.augment import Augmentation
from train.data.feed import Feed, in_order
from train.evaluate.eval_step import make_eval_call
from train.machine.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        num_examples: Number of examples, each counted once.
        loss: Mean cross-entropy, in nats.
        top1: Share of examples whose class scores highest, in [0, 1].
        top5: Share whose class is among the five highest; 1 for five classes or fewer.
        confusion: [classes, classes] int; rows are true classes, columns predictions.
        class_names: The name of each class.
        gate_rates: Share of open gates of each inertial layer, by path.
        right: Whether each example's class scores highest [num_examples], bool.
        predictions: The class that scores highest, of each example [num_examples], int.
        gate_rates_by_example: The same share in each example [num_examples], by path.
        flip_test: Whether each answer is the mean of those to the image and to its
            mirror image.
        held_out: The fingerprint of the test images, where they were held out of
            training images; None: they are the set's own.
    """

    num_examples: int
    loss: float
    top1: float
    top5: float
    confusion: np.ndarray
    class_names: tuple[str, ...]
    gate_rates: Mapping[str, float]
    right: np.ndarray
    predictions: np.ndarray
    gate_rates_by_example: Mapping[str, np.ndarray] = dataclasses.field(
        default_factory=dict
    )
    flip_test: bool = False
    held_out: str | None = None

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy of each class [classes]; NaN for a class without examples."""
        counts = self.confusion.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / counts

    @property
    def has_top5(self) -> bool:
        """Whether `top5` says anything: any answer is among five classes' five best."""
        return len(self.class_names) > 5

    def metrics(self) -> dict[str, float]:
        """Returns the numbers that are logged."""
        rates = {f"gate_rate/{path}": rate for path, rate in self.gate_rates.items()}
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, **rates}

    def to_json(self) -> str:
        """Returns everything as JSON; a class without examples has accuracy null."""
        return json.dumps(
            {
                "num_examples": self.num_examples,
                "flip_test": self.flip_test,
                "held_out": self.held_out,
                **self.metrics(),
                "class_names": self.class_names,
                "per_class": [
                    None if np.isnan(share) else share for share in self.per_class
                ],
                "confusion": self.confusion.tolist(),
            },
            indent=1,
        )

    def __str__(self) -> str:
        right = int(np.trace(self.confusion))
        how = ", images and mirror images" if self.flip_test else ""
        lines = [
            f"top-1     {100 * self.top1:6.2f}%  "
            f"({right:,} of {self.num_examples:,}{how})",
            *([f"top-5     {100 * self.top5:6.2f}%"] if self.has_top5 else []),
            f"loss      {self.loss:7.4f}",
        ]
        if self.gate_rates:
            rates = [[f"  {p}", f"{r:.3f}"] for p, r in self.gate_rates.items()]
            lines += ["", "Open gates by layer", aligned(rates)]
        title, rows, absent = "Accuracy by class", [], []
        has_matrix = len(self.class_names) <= 20
        if has_matrix:
            title += ", and confusion matrix (rows: truth, columns: answer)"
        for name, share, counts in zip(
            self.class_names, self.per_class, self.confusion, strict=True
        ):
            if np.isnan(share):
                absent.append(name)
                continue
            answers = list(map(str, counts)) if has_matrix else []
            rows.append([f"  {name}", f"{100 * share:.2f}%", *answers])
        lines += ["", title, aligned(rows)]
        if absent:
            more = f" and {len(absent) - 5:,} more" if len(absent) > 5 else ""
            lines.append(f"without images: {', '.join(absent[:5])}{more}")
        return "\n".join(lines)


def paired_difference(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Returns the difference in top-1 and half its 95% interval, example by example.

    Networks mostly err on the same examples, so that the difference is known better
    than either accuracy.

    Raises:
        ValueError: The evaluations are of different examples.
    """
    if before.held_out != after.held_out:
        raise ValueError("`after` is of other test images than `before`.")
    if before.num_examples != after.num_examples:
        raise ValueError(
            f"`after` has {after.num_examples} examples; must have those of `before`, "
            f"{before.num_examples}."
        )
    changes = after.right.astype(np.float64) - before.right
    return float(changes.mean()), float(1.96 * changes.std() / len(changes) ** 0.5)


def in_points(difference: float, margin: float) -> str:
    """Returns what `paired_difference` returns, in points."""
    return f"{100 * difference:+.2f} +-{100 * margin:.2f}"


def make_evaluator(
    model: nn.Module,
    augmentation: Augmentation,
    feed: Feed,
    parallel: Parallel,
    *,
    batch_size: int,
    class_names: tuple[str, ...],
    flip_test: bool = False,
) -> Callable[[Any], Evaluation]:
    """Returns a function that evaluates replicated variables.

    Losses are summed on the host in float64 in the order of the examples, so that the
    number of devices does not matter. `batch_size` is rounded up to a multiple of it.
    """
    num_examples, num_classes = len(feed.split), len(class_names)
    devices = parallel.num_devices
    batch_size = -(-min(batch_size, num_examples) // devices) * devices
    evaluate = make_eval_call(without_ladders(model), augmentation, flip_test=flip_test)

    def per_device(variables: Any, images: Any, labels: Any, indices: Any) -> Any:
        return evaluate(variables, images, labels, indices[0])

    call = parallel.wrap(per_device, (False, *feed.spread))

    def run(variables: Any) -> Evaluation:
        parts = [
            call(variables, *inputs)
            for inputs in feed.calls(in_order(num_examples, batch_size), 1)
        ]
        results: Any = jax.tree.map(
            lambda *values: np.concatenate(values)[:num_examples],
            *jax.device_get(parts),
        )
        confusion = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(confusion, (feed.split.labels, results["prediction"]), 1)
        return Evaluation(
            num_examples=num_examples,
            loss=float(results["loss"].astype(np.float64).mean()),
            top1=float((results["rank"] < 1).mean()),
            top5=float((results["rank"] < 5).mean()),
            confusion=confusion,
            class_names=class_names,
            gate_rates={
                path: float(rates.astype(np.float64).mean())
                for path, rates in results["gate_rates"].items()
            },
            right=results["rank"] < 1,
            predictions=np.asarray(results["prediction"]),
            gate_rates_by_example=results["gate_rates"],
            flip_test=flip_test,
        )

    return run
