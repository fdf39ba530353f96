"""ResNet20, imported from PyTorch, with Tucker-2 factors, on a CPU of two cores.

`import` makes its checkpoint (README.md); --data says what images are taken.
"""

from train.experiments.study_config import Smaller, Study

study = Study(
    checkpoint="checkpoints/resnet20",
    smaller={
        name: Smaller(("--ranks", f"budget:macs={share}", "--method", "hooi"))
        for name, share in {"half": 0.5, "macs_35": 0.35, "macs_28": 0.28}.items()
    },
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
