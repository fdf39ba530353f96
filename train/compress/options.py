"""The options of `python -m train compress`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from inertia_jax import Budget
from inertia_jax.chips.compiler import topology
from inertia_jax.compression.reconstruct import LEAST_IMAGES
from inertia_jax.ops.inertial.settings import Low, Metric, Reference
from inertia_jax.plan.specs import Inertial
from train.compress.rank_rules import parse_ranks
from train.config import (
    CacheDirOption,
    CropPaddingOption,
    Data,
    FactoryOption,
    FlipOption,
    ResizedCropOption,
    SourceOption,
)
from train.errors import UsageError, user_input
from train.run.outputs import check_output, check_output_file
from train.sources import Source


@dataclasses.dataclass(frozen=True)
class Compress:
    """Makes a trained network smaller, and evaluates it before and after.

    With `--ranks`, convolutions become Tucker-2 factors. With `--macs`, they become
    inertial, in tiles. BatchNorm is then recalibrated on training images. With
    `--reconstruction-images`, kernels are fitted to the outputs of the dense layers
    before that. Nothing is trained unless `--finetune-epochs` asks for it; `python -m
    train finetune OUT` has more options for that.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or run, of which the best checkpoint is taken."""
    out: str
    """Directory of the new checkpoint, which must not exist."""
    ranks: str | None = None
    """Tucker-2: ratio:0.2, energy:0.9, evbmf, budget:macs=0.5 (or params, latency) or
    plan:FILE."""
    macs: float | None = None
    """Inertial: share of the network's MACs to keep, in (0, 1]; friction counts."""
    method: Literal["hosvd", "hooi", "inertial"] | None = None
    """Method that finds the factors; None: hosvd. `inertial` goes with `--macs`."""
    layers: str = "*"
    """Glob over the paths of the convolutions that may change."""
    keep_stem: bool = False
    """Tucker-2: leave the first convolution as it is."""
    round_to: int = 1
    """Tucker-2: number of which all ranks become multiples, rounded up."""
    weigh: bool = True
    """Tucker-2: weigh errors by the inputs that each layer has of calibration
    images."""
    latency_batch: int = 0
    """Tucker-2: number of images a call with which layers are timed; 0: layers are not
    timed without `--device`, and a budget of latency takes 64."""
    device: str | None = None
    """Tucker-2: chip whose time counts in a budget of latency and is reported, v4, v5e,
    v5p or v6e, as its compiler estimates it in bfloat16; it need not be there, but
    libtpu must (the extra `tpu`). None: this machine."""
    tile_size: int = 2
    """Inertial: side of a tile of outputs."""
    metric: Metric = Inertial.metric
    """Inertial: measure of friction; `random` is a control with noise in place of
    friction."""
    reference: Reference = Inertial.reference
    """Inertial: value from which friction is measured."""
    low: Low = Inertial.low
    """Inertial: value that fills a tile of low friction."""
    channel_stride: int = Inertial.channel_stride
    """Inertial: distance between the channels on which friction is measured."""
    data: SourceOption = None
    """tfds:NAME, imagefolder:PATH, npz:PATH or digits; None: the data that the network
    was trained on."""
    cache_dir: CacheDirOption = Data.cache_dir
    """Directory in which decoded sets are kept."""
    calibration_images: int = 512
    """Number of training images that choose ranks or thresholds, not augmented."""
    recalibration_images: int = 4096
    """Number of training images that recalibrate BatchNorm, augmented as in
    training."""
    reconstruction_images: int = 0
    """Number of training images on which every layer's kernels are fitted to the
    outputs of the dense layer, by least squares; a quarter of them say when to stop. 0:
    kernels are not fitted."""
    crop_padding: CropPaddingOption = None
    """Padding of random crops in the training of the checkpoint; None: as the
    checkpoint says. An imported one does not say it, so that this must be given."""
    flip: FlipOption = None
    """Whether the training of the checkpoint mirrored images; None: as the checkpoint
    says. For an imported one this must be given."""
    resized_crop: ResizedCropOption = None
    """Whether it was on random parts of images, resized, instead of padded crops; None:
    as the checkpoint says, no if it was imported."""
    also_test: tuple[Source, ...] = ()
    """Further data whose test images are evaluated before and after."""
    finetune_epochs: int = 0
    """Number of epochs for which OUT is then trained, with the old network as teacher,
    in OUT_finetuned."""
    finetune_learning_rate: float = 0.02
    """First learning rate of these epochs, which falls to 0 by cosine."""
    factory: FactoryOption = None
    """What makes a network of your own, as MODULE:FUNCTION; None: as the checkpoint
    says."""
    record: str | None = None
    """File to which costs and accuracies are written, as JSON."""
    seed: int = 1
    """Seed of the choice of images and of their augmentation."""
    resume: bool = False
    """Resume this compression where it was stopped, if there is one at OUT."""

    @property
    def is_inertial(self) -> bool:
        """Whether convolutions become inertial, not Tucker-2."""
        return self.macs is not None

    @property
    def timed_batch(self) -> int:
        """The number of images a call with which layers are timed; 0: they are not."""
        return self.latency_batch or (Budget.batch_size if self.device else 0)


# The options of Tucker-2 alone, those that need data, and those of inertial layers.
_OF_TUCKER2 = ("keep_stem", "round_to", "weigh", "latency_batch", "device")
AUGMENTATION = ("crop_padding", "flip", "resized_crop")
_OF_DATA = (
    "also_test",
    "recalibration_images",
    "reconstruction_images",
    *AUGMENTATION,
)
_OF_INERTIAL = ("tile_size", "metric", "reference", "low", "channel_stride")


def check_options(args: Compress) -> None:
    """Raises UsageError where options contradict each other, or lie outside a range."""
    _check_method(args)
    for name in _OF_TUCKER2 if args.is_inertial else _OF_INERTIAL:
        value = getattr(args, name)
        if value != getattr(Compress, name):
            given = "--macs" if args.is_inertial else "--ranks"
            raise UsageError(f"`{name}` (={value}) does nothing with {given}.")
    check_output("out", args.out)
    check_output_file("record", args.record)
    rate = args.finetune_learning_rate
    if not 0 < rate < float("inf"):
        raise UsageError(f"`finetune_learning_rate` (={rate}) must be > 0.")
    if not args.finetune_epochs and rate != Compress.finetune_learning_rate:
        raise UsageError(
            f"`finetune_learning_rate` (={rate}) does nothing without "
            f"`finetune_epochs`."
        )
    for name in ("finetune_epochs", "latency_batch", "seed", "crop_padding"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UsageError(f"`{name}` (={value}) must be >= 0.")
    for name, least, is_needed in (
        ("calibration_images", 2, True),
        ("recalibration_images", 2, args.is_inertial),
        ("reconstruction_images", LEAST_IMAGES, False),
    ):
        value = getattr(args, name)
        if value < least and (is_needed or value):
            rule = f">= {least}" if is_needed else f"0 or >= {least}"
            raise UsageError(f"`{name}` (={value}) must be {rule}.")
    if args.ranks is not None:
        parse_ranks(args.ranks)
    if args.device is not None:
        with user_input():
            topology(args.device)
    if args.macs is not None and not 0 < args.macs <= 1:
        raise UsageError(f"`macs` (={args.macs}) must be in (0, 1].")


def check_options_without_data(args: Compress) -> None:
    """Raises UsageError where an option is set that does nothing without data."""
    for name in _OF_DATA:
        value = getattr(args, name)
        if value != getattr(Compress, name):
            raise UsageError(
                f"`{name}` (={value}) does nothing without data; say which with --data."
            )


def _check_method(args: Compress) -> None:
    if args.ranks is None and args.macs is None:
        raise UsageError(
            "--ranks (for Tucker-2 factors) or --macs (for inertial layers) must be "
            "given."
        )
    if args.ranks is not None and args.macs is not None:
        raise UsageError(
            f"`ranks` (={args.ranks}) and `macs` (={args.macs}) must not both be given."
        )
    if args.method is not None and args.is_inertial != (args.method == "inertial"):
        rule = (
            "inertial with --macs" if args.is_inertial else "hosvd or hooi with --ranks"
        )
        raise UsageError(f"`method` (={args.method}) must be {rule}.")
