"""CIFAR-10, ResNet18, meant for 94% in few seconds of one GPU: 20 epochs, one cycle.

Not measured on a GPU yet. The parts are known ones: one cycle, Nesterov's momentum,
batch 512, label smoothing 0.2, mirrored padding, averages of the weights and a flip
test from Page's "How to train your ResNet" (the DAWNBench entry),
https://myrtle.ai/learn/how-to-train-your-resnet/; alternating flips from Jordan's "94%
on CIFAR-10 in 3.29 seconds on a single GPU", https://arxiv.org/abs/2404.00498. Both
have small networks of their own; this is the ordinary ResNet18.
"""

from train.config import Config, Data, Model, Optimizer

config = Config(
    name="cifar10_resnet18_fast",
    epochs=20,
    batch_size=512,
    eval_batch_size=2000,
    flip_test=True,
    data=Data(crop_mode="reflect", flip_mode="alternating"),
    model=Model(dtype="bfloat16"),
    optimizer=Optimizer(
        learning_rate=0.1,
        base_batch_size=128,
        nesterov=True,
        schedule="one_cycle",
        label_smoothing=0.2,
        decay_norm_and_bias=False,
        ema_decay=0.99,
    ),
)
