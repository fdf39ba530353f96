"""A narrow ResNet18 on scikit-learn's digits at 16 x 16, as the quick start has it."""

from train.config import Config, Data, Model, Optimizer

config = Config(
    name="quickstart",
    epochs=12,
    batch_size=64,
    data=Data(
        source="digits",
        image_size=16,
        mean=(0.305,),
        std=(0.376,),
        crop_padding=1,
        flip=False,
    ),
    model=Model(width=0.125),
    optimizer=Optimizer(learning_rate=0.05, schedule="cosine"),
)
