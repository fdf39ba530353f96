"""ResNet20, as its author trained it, with Tucker-2 factors: two cores."""

from train.experiments.study_config import Smaller, Study

study = Study(
    checkpoint="checkpoints/resnet20",
    smaller={"half": Smaller(("--ranks", "budget:macs=0.5", "--method", "hooi"))},
    compress=("--crop-padding", "4", "--flip", "True"),
    finetune=(
        *("--epochs", "10", "--optimizer.learning-rate", "0.05"),
        *("--optimizer.nesterov", "True", "--eval-batch-size", "500"),
    ),
    teacher=True,
    control=True,
    against=("torch", "onnx"),
)
