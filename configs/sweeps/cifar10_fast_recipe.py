"""CIFAR-10, ResNet18 at width 0.125, 10 epochs: fast recipe, less one item each."""

import dataclasses
import pathlib

from train.config import Config, Model, Optimizer
from train.config_file import load_config
from train.experiments.sweep import Sweep

fast = load_config(pathlib.Path(__file__).parents[1] / "cifar10_resnet18_fast.py")
# Float32 for CPU, and the faithful recipe's batch.
fast = dataclasses.replace(
    fast,
    name="fast",
    epochs=10,
    batch_size=128,
    eval_batch_size=500,
    model=Model(width=0.125),
)
faithful = Config(
    name="faithful_cosine",
    epochs=fast.epochs,
    model=fast.model,
    optimizer=Optimizer(schedule="cosine"),
)


def without(name: str, part: str, **options: object) -> Config:
    changed = dataclasses.replace(getattr(fast, part), **options)
    return dataclasses.replace(fast, name=f"fast_without_{name}", **{part: changed})


sweep = Sweep(
    (
        faithful,
        fast,
        without("averages", "optimizer", ema_decay=0.0),
        without("one_cycle", "optimizer", schedule="cosine"),
        without("smoothing", "optimizer", label_smoothing=0.0),
        without("nesterov", "optimizer", nesterov=False),
        without("sparing", "optimizer", decay_norm_and_bias=True),
        without("alternating", "data", flip_mode="random"),
        without("reflect", "data", crop_mode="zeros"),
    ),
    seeds=(1,),
)
