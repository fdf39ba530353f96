"""ResNet18 at half width on CIFAR-10, smaller by factors, tiles and both: two cores."""

from train.experiments.study_config import Smaller, Study

_FACTORS = ("--method", "hooi", "--ranks")

study = Study(
    config="cifar10_resnet18_cpu",
    smaller={
        "quarter": Smaller((*_FACTORS, "budget:macs=0.25")),
        "half": Smaller((*_FACTORS, "budget:macs=0.5")),
        "tenth": Smaller((*_FACTORS, "budget:macs=0.1")),
        "half_time": Smaller((*_FACTORS, "budget:latency=0.5")),
        "inertial": Smaller(("--macs", "0.8")),
        "half_inertial": Smaller(("--macs", "0.8"), start="half"),
    },
    finetune=(
        *("--epochs", "2", "--optimizer.learning-rate", "0.03"),
        *("--optimizer.nesterov", "True", "--eval-batch-size", "500"),
    ),
    teacher=True,
    control=True,
    export=("--batch-size", "64"),
    against=("torch", "onnx"),
)
