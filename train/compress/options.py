"""The options of `python -m train compress`."""

import dataclasses
from typing import Literal

from inertia_jax.ops.inertial.settings import Low, Metric, Reference
from inertia_jax.plan.specs import Inertial
from train.config import (
    CacheDirOption,
    CheckpointArgument,
    Config,
    CropPaddingOption,
    FactoryOption,
    FlipOption,
    ResizedCropOption,
    SourceOption,
)
from train.sources import Source

# Options that say how the training images were augmented.
AUGMENTATION = ("crop_padding", "flip", "resized_crop")


@dataclasses.dataclass(frozen=True)
class Compress:
    """Makes a trained network smaller, and evaluates it before and after.

    With `--ranks`, convolutions become Tucker-2 factors. With `--macs` or `--latency`,
    they become inertial, in tiles. BatchNorm is then recalibrated on training images.
    With `--reconstruction-images`, kernels are fitted to the outputs of the dense
    layers before that. Nothing is trained unless `--finetune-epochs` asks for it;
    `python -m train finetune OUT` has more options for that.
    """

    checkpoint: CheckpointArgument
    """Checkpoint, or run, of which the best checkpoint is taken."""
    out: str
    """Directory of the new checkpoint, which must not exist."""
    ranks: str | None = None
    """Tucker-2: ratio:0.2, energy:0.9, evbmf, budget:macs=0.5 (or params, latency) or
    plan:FILE."""
    macs: float | None = None
    """Inertial: share of the network's MACs to keep, in (0, 1]; friction counts."""
    latency: float | None = None
    """Inertial, in place of `--macs`: share of the network's time to keep, in (0, 1],
    measured here; layers that tiles do not make faster stay dense."""
    method: Literal["hosvd", "hooi", "inertial"] | None = None
    """Method that finds the factors; None: hosvd. `inertial` goes with `--macs` and
    `--latency`."""
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
    """Number of images a call with which networks and layers are timed; 0: 64 with
    `--device`, `--latency` or a budget of latency, and else they are not."""
    device: str | None = None
    """Tucker-2: chip whose time counts in a budget of latency and is reported, v4, v5e,
    v5p or v6e, as its compiler estimates it in bfloat16; it need not be there, but
    libtpu must (the extra `tpu`). None: this machine."""
    tile_size: tuple[int, ...] = (2,)
    """Inertial: side of a tile of outputs; of several, each layer takes the one that
    costs least accuracy for what it saves."""
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
    cache_dir: CacheDirOption = None
    """Directory in which decoded sets are kept; None: the training's, if it is here."""
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
    finetune_batch_size: int = Config.batch_size
    """Training images in a step of these epochs, over all devices."""
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
        return self.macs is not None or self.latency is not None

    @property
    def timed_batch(self) -> int:
        """The number of images a call with which layers are timed; 0: they are not."""
        is_timed = self.latency or (self.ranks or "").startswith("budget:latency")
        if self.latency_batch or not (is_timed or self.device):
            return self.latency_batch
        # Help and completion need the options alone.
        from inertia_jax import Budget

        return Budget.batch_size
