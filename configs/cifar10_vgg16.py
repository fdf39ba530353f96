"""CIFAR-10, vgg16, the full recipe: SGD 0.1, 200 epochs, x0.1 at epoch 150."""

from train.config import Config, Model

config = Config(name="cifar10_vgg16", model=Model(name="vgg16"))
