"""A network as users have theirs, and functions that make it or fail to."""

import sys

import flax.linen as nn
import jax.numpy as jnp


class OwnCNN(nn.Module):
    classes: int
    widths: list

    @nn.compact
    def __call__(self, x, deterministic=True):
        for width in self.widths:
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(x))
        x = nn.Dropout(0.1, deterministic=deterministic)(x.mean((1, 2)))
        return nn.Dense(self.classes)(x)


def make(num_classes):
    return OwnCNN(num_classes, [8, 8])


def make_number(num_classes):
    return num_classes


def make_two(num_classes):
    return nn.Sequential([nn.Dense(num_classes), lambda x: (x, x)])


def make_map(num_classes):
    return nn.Conv(num_classes, (3, 3))


def make_flat(num_classes):
    return nn.Sequential([lambda x: x.reshape(len(x), 5), nn.Dense(num_classes)])


def make_sorted(num_classes):
    """Makes a network that has no form in PyTorch's source."""
    return nn.Sequential([make(num_classes), lambda x: jnp.sort(x, axis=-1)])


def make_none(num_classes):
    raise KeyError("oops")


def make_exit(num_classes):
    sys.exit(3)


def make_wide(num_classes):
    return OwnCNN(num_classes, [8, 9])
