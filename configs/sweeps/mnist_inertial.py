"""MNIST, LeNet, 15 epochs: dense and inertial, the original authors' own table."""

from inertia_jax import Conv, Inertial, Plan, Rate
from train.config import Config, Data, Model, Optimizer
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

sweep = Sweep(
    tuple(
        Config(
            name=name,
            epochs=15,
            batch_size=64,
            data=Data(
                source="tfds:mnist",
                mean=(0.1307,),
                std=(0.3081,),
                crop_padding=0,
                flip=False,
            ),
            model=Model(name="lenet", plan=Plan(rules).to_json()),
            optimizer=Optimizer(
                name="adadelta",
                learning_rate=1.0,
                weight_decay=0.0,
                schedule="exponential",
                decay=0.7,
            ),
        )
        for name, rules in RULES.items()
    )
)
