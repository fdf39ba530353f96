"""CIFAR-10, ResNet18 at half of its width: the fast recipe for a CPU of two cores.

The parts are those of `cifar10_resnet18_fast.py`, in float32 and with the batch size of
the ordinary recipe: few epochs have too few steps of larger batches.
"""

from train.config import Config, Data, Model, Optimizer

config = Config(
    name="cifar10_resnet18_cpu",
    epochs=8,
    eval_batch_size=500,
    flip_test=True,
    data=Data(crop_mode="reflect", flip_mode="alternating"),
    model=Model(width=0.5),
    optimizer=Optimizer(
        learning_rate=0.1,
        nesterov=True,
        schedule="one_cycle",
        label_smoothing=0.2,
        decay_norm_and_bias=False,
        ema_decay=0.99,
    ),
)
