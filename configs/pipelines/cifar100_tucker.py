"""CIFAR-100 at 224: ImageNet's ResNet18, a new head, Tucker-2 at 0.2, fine-tuning."""

from train.config import Config, Data, Model, Optimizer
from train.experiments.pipeline_config import Pipeline

pipeline = Pipeline(
    run=Config(
        name="cifar100_tucker",
        epochs=5,
        batch_size=64,
        eval_batch_size=128,
        data=Data(
            source="tfds:cifar100",
            image_size=224,
            eval_resize=256,
            resized_crop=True,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        model=Model(name="resnet18", stem="imagenet"),
        optimizer=Optimizer(
            learning_rate=0.01, schedule="exponential", decay=0.1, decay_epochs=2
        ),
    ),
    head="fc",
    head_epochs=5,
    ranks=("ratio:0.2",),
)
