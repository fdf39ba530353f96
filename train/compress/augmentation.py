"""The augmentation of the training images that measure a compressed network."""

import dataclasses

from inertia_jax.compression.recalibrate import running_statistics
from train.compress.options import AUGMENTATION, Compress
from train.config import Data
from train.errors import UsageError
from train.networks import NetworkDescription, TrainedNetwork


def augmentation_of(args: Compress, network: NetworkDescription) -> Data | None:
    """Returns how the images of the training were augmented.

    What the options say comes before what the checkpoint says. None: they do not say
    enough. Other augmentation than the network's own moves its BatchNorm statistics: on
    plain images, they cost a CIFAR-10 ResNet20 four points, even a dense one.

    Raises:
        UsageError: An option that has no effect.
    """
    given = {name: getattr(args, name) for name in AUGMENTATION}
    given = {name: value for name, value in given.items() if value is not None}
    recorded = network.recorded_data
    data = dataclasses.replace(network.trained_on or Data(source=""), **given)
    padding = given.get("crop_padding", 0)
    if data.resized_crop and padding not in (0, recorded.get("crop_padding")):
        raise UsageError(
            f"`crop_padding` (={padding}) does nothing with `resized_crop` (=True)."
        )
    needed = {"flip"} if data.resized_crop else {"flip", "crop_padding"}
    return data if needed <= {*given, *recorded} else None


def needed_augmentation(args: Compress, network: NetworkDescription) -> Data:
    """Returns what `augmentation_of` does.

    Raises:
        UsageError: Neither options nor checkpoint say it.
    """
    augmentation = augmentation_of(args, network)
    if augmentation is None:
        raise UsageError(
            f"{network.path} does not say how its training images were augmented, and "
            f"the result depends on it; say it with --crop-padding and --flip (mostly "
            f"4 and True for CIFAR, 0 and False for none), or with --resized-crop True "
            f"and --flip."
        )
    return augmentation


def with_augmentation(args: Compress, network: TrainedNetwork) -> Compress:
    """Returns the options with the augmentation of the training filled in, if known.

    Raises:
        UsageError: Training images are to be augmented, and nothing says how.
    """
    find = needed_augmentation if uses_augmentation(args, network) else augmentation_of
    augmentation = find(args, network)
    if augmentation is None:
        return args
    known = {name: getattr(augmentation, name) for name in AUGMENTATION}
    return dataclasses.replace(args, **known)


def uses_augmentation(args: Compress, network: TrainedNetwork) -> bool:
    """Returns whether the result depends on augmented training images."""
    recalibrates = args.recalibration_images and running_statistics(network.variables)
    is_used = recalibrates or args.reconstruction_images or args.finetune_epochs
    return bool(args.data and is_used)


def in_words(args: Compress, network: NetworkDescription) -> str:
    """Returns the augmentation that is used, and who says so, as a line."""
    data = needed_augmentation(args, network)
    crop = "not cropped"
    if data.resized_crop:
        crop = "cropped to random parts, resized"
    elif data.crop_padding:
        crop = f"cropped at random, padded by {data.crop_padding} ({data.crop_mode})"
    is_told = any(getattr(args, name) is not None for name in AUGMENTATION)
    more = [
        words
        for words, is_used in {
            f"RandAugment ({data.rand_augment} operations)": data.rand_augment,
            "random erasing": data.random_erasing,
            "mixup": data.mixup,
            "CutMix": data.cutmix,
        }.items()
        if is_used
    ]
    further = f", with {', '.join(more)}" if more else ""
    return (
        f"training images are {crop}, {'' if data.flip else 'not '}mirrored{further}, "
        f"as the "
        f"{'options say' if is_told else 'checkpoint says'}"
    )
