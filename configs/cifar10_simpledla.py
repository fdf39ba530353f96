"""CIFAR-10, simpledla, the full recipe: SGD 0.1, 200 epochs, x0.1 at epoch 150."""

from train.config import Config, Model

config = Config(name="cifar10_simpledla", model=Model(name="simpledla"))
