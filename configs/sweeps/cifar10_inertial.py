"""CIFAR-10, ResNet18 at width 0.125: dense, inertial in both readings, and controls."""

from inertia_jax import Conv, Fixed, Inertial, Plan, Rate
from train.config import Config, Data, Model, Optimizer
from train.experiments.sweep import Sweep

LAYERS = "layer*conv?"  # every 3x3 but the stem


def window(core_size, region_size, **options):
    return Inertial(core_size, region_size, **{"threshold": Rate(0.5), **options})


def tiled(threshold, **options):
    return Inertial(3, 4, reading="tiled", threshold=threshold, **options)


weighted = {"combine": "weighted_channel"}
SPECS = {
    "dense_3x3": Conv(),
    "dense_1x1": Conv(kernel_size=1),  # the window d=3, m=1 with its gates closed
    "window_d3m1_mean": window(1, 3),
    "window_d3m1_weighted": window(1, 3, **weighted),
    "window_d3m1_weighted_open": window(1, 3, threshold=Fixed.OPEN, **weighted),
    "window_d3m1_weighted_random": window(1, 3, metric="random", **weighted),
    "window_d5m3_mean": window(3, 5),
    "window_d5m3_weighted": window(3, 5, **weighted),
    "tiled_0.5": tiled(Rate(0.5)),
    "tiled_0.25": tiled(Rate(0.25)),
    "tiled_0.1": tiled(Rate(0.1)),
    "tiled_closed": tiled(Fixed.CLOSED),  # open is dense_3x3
    "tiled_0.5_random": tiled(Rate(0.5), metric="random"),
    "tiled_0.25_random": tiled(Rate(0.25), metric="random"),
    "tiled_0.1_random": tiled(Rate(0.1), metric="random"),
}

sweep = Sweep(
    tuple(
        Config(
            name=name,
            epochs=15,
            data=Data(source="tfds:cifar10"),
            model=Model(width=0.125, plan=Plan(((LAYERS, spec),)).to_json()),
            optimizer=Optimizer(schedule="cosine"),
        )
        for name, spec in SPECS.items()
    )
)
