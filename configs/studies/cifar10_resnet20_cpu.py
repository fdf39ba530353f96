"""ResNet20, imported from PyTorch, with Tucker-2 factors, on a CPU of two cores.

`import` makes its checkpoint (README.md); --data says what images are taken.
"""

from train.experiments.study_config import Smaller, Study

study = Study(
    checkpoint="checkpoints/resnet20",
    smaller={"half": Smaller(("--ranks", "budget:macs=0.5", "--method", "hooi"))},
    compress=("--crop-padding", "4", "--flip", "True"),
    finetune=(
        *("--epochs", "10", "--optimizer.learning-rate", "0.05"),
        *("--optimizer.nesterov", "True", "--eval-batch-size", "500"),
        *("--data.crop-padding", "4", "--data.flip", "True"),
    ),
    teacher=True,
    control=True,
    against=("torch", "onnx"),
)
