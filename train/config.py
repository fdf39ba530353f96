"""The configuration of a run: every default is written here, once."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Annotated, Any, Literal

import tyro

from inertia_jax.models.names import check_model_name
from inertia_jax.ops.inertial.settings import near_miss
from train.errors import UsageError, shortened, user_input
from train.sources import Source

# What makes a network of the user's own, for verbs that open a checkpoint.
FactoryOption = Annotated[str | None, tyro.conf.arg(name="model.factory")]

# A verb's checkpoint, which is said without an option.
CheckpointArgument = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")
]
# Options of data, as verbs have them whose options are not nested. Either spelling is
# taken everywhere.
SourceOption = Annotated[Source | None, tyro.conf.arg(aliases=("--data.source",))]
CacheDirOption = Annotated[str | None, tyro.conf.arg(aliases=("--data.cache-dir",))]
CropPaddingOption = Annotated[
    int | None, tyro.conf.arg(aliases=("--data.crop-padding",))
]
FlipOption = Annotated[bool | None, tyro.conf.arg(aliases=("--data.flip",))]
ResizedCropOption = Annotated[
    bool | None, tyro.conf.arg(aliases=("--data.resized-crop",))
]

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def _check_choices(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        allowed = typing.get_args(hint)
        value = getattr(config, name)
        if typing.get_origin(hint) is Literal and value not in allowed:
            near = near_miss(value, allowed)
            raise UsageError(f"`{name}` (={value!r}) must be one of {allowed}.{near}")


def _check_range(
    name: str,
    value: float | None,
    least: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> None:
    if value is None:
        return
    rules = {
        # No array holds more, and no float much more.
        "< 2**63": not isinstance(value, int) or value < 2**63,
        "finite": isinstance(value, int) or math.isfinite(value) or not finite,
        f">= {least}": least is None or value >= least,
        f"> {above}": above is None or value > above,
        f"< {below}": below is None or value < below,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise UsageError(f"`{name}` (={shortened(value)}) must be {broken[0]}.")


@dataclasses.dataclass(frozen=True)
class Data:
    """Images and what happens to them."""

    source: Annotated[Source, tyro.conf.arg(aliases=("--data",))] = "tfds:cifar10"
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits."""
    cache_dir: Annotated[str, tyro.conf.arg(aliases=("--cache-dir",))] = (
        "~/.cache/inertia_jax"
    )
    """Directory in which downloaded and decoded sets are kept."""
    test_share: float = 0.0
    """Share of the training images that are held out as test images, of each class; for
    a source that has none of its own."""
    validation_share: float = 0.0
    """Share of the training images that are held out, of each class, and choose the
    best checkpoint; 0: the test images choose it."""
    split_seed: int = 0
    """Seed of the draw of the images that are held out; that of the run does not change
    them."""
    image_size: int | tuple[int, int] | None = None
    """Height and width of the network's input, in pixels; one number: both; None: as
    the images are stored."""
    mean: tuple[float, ...] = CIFAR_MEAN
    """Mean of each channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = CIFAR_STD
    """Standard deviation of each channel, of pixels in [0, 1]."""
    crop_padding: Annotated[int, tyro.conf.arg(aliases=("--crop-padding",))] = 4
    """Pixels around a training image before a random crop of its own size."""
    crop_mode: Literal["zeros", "reflect"] = "zeros"
    """Content of these pixels: zeros, or the image mirrored at its edges."""
    flip: Annotated[bool, tyro.conf.arg(aliases=("--flip",))] = True
    """Mirror every second training image, by `flip_mode`."""
    flip_mode: Literal["random", "alternating"] = "random"
    """Mirrored images: drawn in every epoch, or drawn once and then alternating."""
    resized_crop: Annotated[bool, tyro.conf.arg(aliases=("--resized-crop",))] = False
    """Train on a random part (8% to 100%) of each image, resized, instead of the padded
    crop."""
    rand_augment: int = 0
    """Operations of RandAugment on each training image; 0: none."""
    rand_augment_magnitude: int = 9
    """Magnitude of these operations, in [0, 30]."""
    random_erasing: float = 0.0
    """Share of the training images of which a box is erased."""
    mixup: float = 0.0
    """Alpha of mixup: each training image and label is mixed with those before it in
    the batch, by weights from Beta(alpha, alpha); 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix: a box of each training image is that of the image before it in
    the batch; with mixup, half of the images; 0: none."""
    eval_resize: int | tuple[int, int] | None = None
    """Evaluate on the centre of images resized to cover this height and width; one
    number: both; None: those of the input."""
    memory_share: float = 0.25
    """A split larger than this share of device memory streams in chunks."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for value in self.mean:
            _check_range("data.mean", value)
        for value in self.std:
            _check_range("data.std", value, above=0)
        _check_range("data.memory_share", self.memory_share, above=0, finite=False)
        _check_range("data.crop_padding", self.crop_padding, least=0)
        for name in ("rand_augment", "mixup", "cutmix"):
            _check_range(f"data.{name}", getattr(self, name), least=0)
        for name, most in (("rand_augment_magnitude", 30), ("random_erasing", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise UsageError(f"`data.{name}` (={value}) must be in [0, {most}].")
        _check_range("data.test_share", self.test_share, least=0, below=1)
        _check_range("data.validation_share", self.validation_share, least=0, below=1)
        _check_range("data.split_seed", self.split_seed, least=0, below=2**32)
        shares = self.test_share, self.validation_share
        if sum(shares) >= 1:
            raise UsageError(
                f"`data.test_share` (={shares[0]}) and `data.validation_share` "
                f"(={shares[1]}) must add up to less than 1: the rest is trained on."
            )
        if self.split_seed and not any(shares):
            raise UsageError(
                f"`data.split_seed` (={self.split_seed}) does nothing without "
                f"`data.test_share` and `data.validation_share`."
            )
        for name in ("image_size", "eval_resize"):
            sides = getattr(self, name)
            if sides is None:
                continue
            # This brings Flax, for which the help of the defaults need not wait.
            from inertia_jax.metadata import both_sides, shortest_sides

            with user_input():
                object.__setattr__(self, name, shortest_sides(sides))
            for side in both_sides(sides):
                _check_range(f"data.{name}", side, least=1)

    @property
    def load_size(self) -> tuple[int, int] | None:
        """Height and width to which images are brought when they are loaded."""
        if self.image_size is None:
            return None
        from inertia_jax.metadata import both_sides

        height, width = both_sides(self.image_size)
        resized = both_sides(self.eval_resize or self.image_size)
        return max(height, resized[0]), max(width, resized[1])


@dataclasses.dataclass(frozen=True)
class Model:
    """The network, as `inertia_jax.create_model` takes it."""

    name: Annotated[str, tyro.conf.arg(aliases=("--model",))] = "resnet18"
    """lenet, resnet18/20/32/44/56, simpledla or vgg16."""
    factory: str | None = None
    """A network of your own, whatever `name` is: MODULE:FUNCTION, called with
    `num_classes=N`, returns a Linen module from images to logits."""
    width: float = 1.0
    """Multiplies every number of channels."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers of resnet18."""
    shortcut: Literal["A", "B"] = "A"
    """Shortcuts of resnet20 to resnet56."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the computation; float64 needs JAX_ENABLE_X64=1."""
    plan: str = "[]"
    """Kind of convolution at each layer, as JSON (inertia_jax.Plan.to_json)."""
    strict: bool = False
    """Refuse a plan that a layer cannot follow, instead of leaving the layer dense."""

    def __post_init__(self) -> None:
        _check_choices(self)
        with user_input():
            check_model_name("model.name", self.name)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimiser, its learning rate, and averages."""

    name: Literal["sgd", "adadelta", "adamw", "lion", "muon"] = "sgd"
    """sgd, adadelta (rho 0.9, epsilon 1e-6), adamw, lion, or muon, which moves kernels
    as matrices, with steps of adamw's size, and the rest by adamw."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=("--lr",))] = 0.1
    """Learning rate of the first epoch; the highest of one_cycle."""
    base_batch_size: int | None = None
    """Batch size for which `learning_rate` is given; the rate grows in proportion to
    `batch_size`. None: the rate holds for any batch size."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    betas: tuple[float, float] | None = None
    """Decays of both averages of adamw, of lion, and of the adamw in muon; None: 0.9
    and 0.999, for lion 0.9 and 0.99."""
    weight_decay: float = 5e-4
    """Share of each parameter that is added to its gradient, before the momentum, by
    sgd and adadelta; by the others it is added to the step, before the learning
    rate."""
    decay_norm_and_bias: bool = True
    """Decay BatchNorm's scales and all biases, too."""
    ema_decay: float = 0.0
    """Decay of the averages of all variables over steps, which are evaluated and saved;
    0: no averages."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    schedule: Literal["multistep", "cosine", "exponential", "one_cycle"] = "multistep"
    """Learning rate over time; one_cycle rises from 0 and falls to 0, linearly."""
    milestones: tuple[int, ...] = (150, 225)
    """Epochs at which multistep multiplies by `decay`."""
    decay: float = 0.1
    """Factor of multistep and exponential."""
    decay_epochs: int = 1
    """Epochs between the steps of exponential."""
    peak_share: float = 0.25
    """Share of all steps after which one_cycle is highest, in (0, 1)."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises from 0."""

    @property
    def is_made_for_epochs(self) -> bool:
        """Whether the learning rates of all epochs depend on their number."""
        return self.schedule in ("cosine", "one_cycle")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range("optimizer.learning_rate", self.learning_rate, above=0)
        _check_range("optimizer.base_batch_size", self.base_batch_size, least=1)
        _check_range("optimizer.momentum", self.momentum, least=0, below=1)
        for beta in self.betas or ():
            _check_range("optimizer.betas", beta, least=0, below=1)
        _check_range("optimizer.weight_decay", self.weight_decay, least=0)
        _check_range("optimizer.ema_decay", self.ema_decay, least=0, below=1)
        _check_range("optimizer.label_smoothing", self.label_smoothing, 0, below=1)
        _check_range("optimizer.decay", self.decay, above=0)
        _check_range("optimizer.decay_epochs", self.decay_epochs, least=1)
        _check_range("optimizer.peak_share", self.peak_share, above=0, below=1)
        _check_range("optimizer.warmup_epochs", self.warmup_epochs, least=0)
        if self.schedule == "one_cycle" and self.warmup_epochs:
            raise UsageError(
                f"`optimizer.warmup_epochs` (={self.warmup_epochs}) must be 0 for "
                f"`schedule` (='one_cycle'), which has its own rise."
            )
        for epoch in self.milestones:
            _check_range("optimizer.milestones", epoch, above=0)
        if any(a >= b for a, b in itertools.pairwise((0, *self.milestones))):
            raise UsageError(
                f"`optimizer.milestones` (={self.milestones}) must be > 0 and increase."
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    name: str = "run"
    """Name of the run; its directory is runs/NAME unless `--workdir` says otherwise."""
    seed: int = 1
    """Seed of everything random."""
    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 128
    """Training images in a step, over all devices."""
    eval_batch_size: int = 500
    """Images in an evaluation step, over all devices, rounded up to a multiple of
    their number."""
    early_stopping: int | None = None
    """Epochs without a higher validation top-1 after which the run ends; None: it does
    not end early."""
    flip_test: bool = False
    """Evaluate by the mean logits of each test image and its mirror image."""
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    init: str | None = None
    """Checkpoint of the same network from which training starts, or a run, whose best
    is taken; None: random parameters."""
    new_head: bool = False
    """Draw the last layer anew, for the classes of these data, beside `init`."""
    train_only: tuple[str, ...] = ()
    """Globs over paths of parameters or layers: only these are trained; none: all."""
    freeze: tuple[str, ...] = ()
    """Globs over the same paths: these are not trained; BatchNorm statistics still
    move."""
    teacher: str | None = None
    """Checkpoint of the teacher, or a run, whose best is taken; None: labels alone."""
    distill_weight: float = 0.9
    """Weight of the teacher's part of the loss, in (0, 1]."""
    distill_temperature: float = 4.0
    """Divisor of both networks' logits in the teacher's part of the loss."""
    steps_per_call: int | None = None
    """Steps in a compiled call; None: 1 on CPU, up to 100 on GPU and TPU."""
    gate_budget: float | None = None
    """Mean rate of open gates in inertial layers that the loss aims at; None: any."""
    gate_penalty: float = 1.0
    """Factor of (mean gate rate - gate_budget)^2, which is added to the loss."""
    parallel: Literal["pmap", "shard_map"] = "pmap"
    """JAX's function that spreads the step over devices."""
    sync_batch_norm: bool = True
    """Compute BatchNorm statistics over all devices, not over each one's share."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints inside an epoch, beside the one at its end."""
    checkpoint_steps: int | None = None
    """Steps between such checkpoints; None: time alone decides."""
    log_steps: int = 50
    """Steps between lines of metrics."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range("seed", self.seed, least=0, below=2**32)
        for name in ("epochs", "batch_size", "eval_batch_size", "log_steps"):
            _check_range(name, getattr(self, name), least=1)
        for name in ("steps_per_call", "checkpoint_steps", "early_stopping"):
            _check_range(name, getattr(self, name), least=1)
        if self.early_stopping is not None and not self.data.validation_share:
            raise UsageError(
                f"`early_stopping` (={self.early_stopping}) needs a validation split "
                f"(`data.validation_share`): test images must not end a run."
            )
        minutes = self.checkpoint_minutes
        _check_range("checkpoint_minutes", minutes, above=0, finite=False)
        _check_range("gate_penalty", self.gate_penalty, above=0)
        _check_range("distill_temperature", self.distill_temperature, above=0)
        if not 0 < self.distill_weight <= 1:
            raise UsageError(
                f"`distill_weight` (={self.distill_weight}) must be in (0, 1]."
            )
        if self.gate_budget is not None and not 0 <= self.gate_budget <= 1:
            raise UsageError(f"`gate_budget` (={self.gate_budget}) must be in [0, 1].")
        if self.optimizer.warmup_epochs >= self.epochs:
            raise UsageError(
                f"`optimizer.warmup_epochs` (={self.optimizer.warmup_epochs}) must be "
                f"less than `epochs` (={self.epochs})."
            )


# The defaults of `finetune`: a tenth of the recipe's learning rate, for a few epochs.
FINETUNE = Config(
    name="finetune",
    epochs=5,
    optimizer=Optimizer(learning_rate=0.01, schedule="cosine"),
)

# Each entry: a field, another field, and the condition on the other without which the
# first has no effect.
_NEEDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("model.strict", "model.plan", lambda plan: plan != "[]"),
    ("model.name", "model.factory", lambda factory: factory is None),
    ("model.width", "model.factory", lambda factory: factory is None),
    ("model.stem", "model.factory", lambda factory: factory is None),
    ("model.shortcut", "model.factory", lambda factory: factory is None),
    ("model.dtype", "model.factory", lambda factory: factory is None),
    ("new_head", "init", lambda path: path is not None),
    ("distill_weight", "teacher", lambda path: path is not None),
    ("distill_temperature", "teacher", lambda path: path is not None),
    ("gate_penalty", "gate_budget", lambda budget: budget is not None),
    ("data.crop_padding", "data.resized_crop", lambda resized: not resized),
    ("data.crop_mode", "data.resized_crop", lambda resized: not resized),
    ("data.crop_mode", "data.crop_padding", lambda padding: padding > 0),
    ("data.flip_mode", "data.flip", bool),
    ("data.rand_augment_magnitude", "data.rand_augment", bool),
    ("optimizer.momentum", "optimizer.name", lambda name: name == "sgd"),
    ("optimizer.nesterov", "optimizer.name", lambda name: name == "sgd"),
    (
        "optimizer.betas",
        "optimizer.name",
        lambda name: name in ("adamw", "lion", "muon"),
    ),
    ("optimizer.nesterov", "optimizer.momentum", lambda momentum: momentum > 0),
    ("optimizer.milestones", "optimizer.schedule", lambda s: s == "multistep"),
    (
        "optimizer.decay",
        "optimizer.schedule",
        lambda s: s in ("multistep", "exponential"),
    ),
    ("optimizer.decay_epochs", "optimizer.schedule", lambda s: s == "exponential"),
    ("optimizer.peak_share", "optimizer.schedule", lambda s: s == "one_cycle"),
)


def check_used(config: Config, before: Config, given: Collection[str] = ()) -> None:
    """Raises UsageError if the user set a field that has no effect in this run.

    Args:
        config: The run's configuration.
        before: The configuration before the user set anything: a file's, a checkpoint's
            or the defaults. A field that has no effect there is no error.
        given: Fields that the user set, also to the value that they had before.
    """
    for name, needed, is_used in _NEEDS:
        value, other = attrgetter(name)(config), attrgetter(needed)(config)
        is_set = name in given or value != attrgetter(name)(before)
        if is_set and value and not is_used(other):
            raise UsageError(
                f"`{name}` (={value}) does nothing with `{needed}` (={other})."
            )
