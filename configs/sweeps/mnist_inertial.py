"""MNIST, LeNet, 15 epochs: dense and inertial, the original authors' own table."""

import dataclasses
import pathlib

from inertia_jax import Conv, Inertial, Plan, Rate
from train.config import load_config
from train.sweep import Sweep


def tiled(region_size, rate):
    return Inertial(3, region_size, reading="tiled", threshold=Rate(rate))


def window(region_size, core_size, rate):
    return Inertial(
        core_size, region_size, combine="weighted_channel", threshold=Rate(rate)
    )


RULES = {
    "dense_3x3": (),
    "dense_1x1": (("conv?", Conv(kernel_size=1)),),
    "tiled_6_0.05": (("conv2", tiled(6, 0.05)),),
    "tiled_4_0.05": (("conv2", tiled(4, 0.05)),),
    "tiled_4_0.2": (("conv2", tiled(4, 0.2)),),
    "window_d3m1": (("conv?", window(3, 1, 0.5)),),
}

dense = load_config(pathlib.Path(__file__).parents[1] / "mnist_lenet.py")
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
