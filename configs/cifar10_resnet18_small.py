"""CIFAR-10, ResNet18 at a quarter of the width, 12 epochs: for two CPU cores."""

from train.config import Config, Model, Optimizer

config = Config(
    name="cifar10_resnet18_small",
    epochs=12,
    model=Model(width=0.25),
    optimizer=Optimizer(schedule="cosine"),
)
