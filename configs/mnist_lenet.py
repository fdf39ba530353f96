"""MNIST, LeNet, the recipe of PyTorch's example: Adadelta 1.0, x0.7 an epoch."""

from train.config import Config, Data, Model, Optimizer

config = Config(
    name="mnist_lenet",
    epochs=14,
    batch_size=64,
    data=Data(
        source="tfds:mnist", mean=(0.1307,), std=(0.3081,), crop_padding=0, flip=False
    ),
    model=Model(name="lenet"),
    optimizer=Optimizer(
        name="adadelta",
        learning_rate=1.0,
        weight_decay=0.0,
        schedule="exponential",
        decay=0.7,
    ),
)
