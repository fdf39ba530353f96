"""CIFAR-100, resnet18, with CIFAR-10's recipe and the set's own mean and deviation."""

from train.config import Config, Data

config = Config(
    name="cifar100_resnet18",
    data=Data(
        source="tfds:cifar100",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
)
