"""MNIST, LeNet, 15 epochs: dense and inertial, the original authors' own table."""

import dataclasses
import pathlib

from inertia_jax import Conv, Inertial, Plan, Rate
from train.config_file import load_config
from train.experiments.sweep import Sweep

# Every batch's open tiles must fit a rung of their own: the next would cost twice.
CAPACITIES = (1 / 24, 1 / 12, 1 / 6, 1 / 4, 1 / 2, 1)


def tiled(region_size, rate):
    return Inertial(
        3, region_size, reading="tiled", threshold=Rate(rate), capacities=CAPACITIES
    )


def window(region_size, core_size, rate):
    return Inertial(
        core_size, region_size, combine="weighted_channel", threshold=Rate(rate)
    )


RULES = {
    "tiled_6_0.03": (("conv2", tiled(6, 0.03)),),
    "tiled_5_0.15": (("conv2", tiled(5, 0.15)),),
    "dense_3x3": (),
    "dense_1x1": (("conv?", Conv(kernel_size=1)),),
    "window_d3m1": (("conv?", window(3, 1, 0.5)),),
}

dense = load_config(pathlib.Path(__file__).parents[1] / "mnist_lenet.py")
# Random shifts of up to two pixels, for all: without them the dense network ends at
# 98.5% of the first 3,000 test images.
dense = dataclasses.replace(dense, data=dataclasses.replace(dense.data, crop_padding=2))
sweep = Sweep(
    tuple(
        dataclasses.replace(
            dense,
            name=name,
            epochs=15,
            model=dataclasses.replace(dense.model, plan=Plan(rules).to_json()),
        )
        for name, rules in RULES.items()
    )
)
