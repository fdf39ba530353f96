"""CIFAR-10, resnet18, the full recipe: SGD 0.1, 200 epochs, x0.1 at epoch 150."""

from train.config import Config

config = Config(name="cifar10_resnet18")
