"""Checks of the options of `python -m train compress`, before anything is read."""

from inertia_jax.chips.compiler import topology
from inertia_jax.compression.reconstruct import LEAST_IMAGES
from inertia_jax.layers.kinds import CONVOLUTIONS
from inertia_jax.plan.plan import matches
from train.compress.options import AUGMENTATION, Compress
from train.compress.rank_rules import parse_ranks
from train.errors import UsageError, shortened, user_input
from train.networks import NetworkDescription
from train.run.outputs import check_output, check_output_file

# The options of which one is given: what is to become smaller, and how far.
_METHODS = ("ranks", "macs", "latency")
# The options of Tucker-2 alone, those that need data, and those of inertial layers.
_OF_TUCKER2 = ("keep_stem", "round_to", "weigh", "device")
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
            given = next(n for n in _METHODS if getattr(args, n) is not None)
            raise UsageError(f"`{name}` (={value}) does nothing with --{given}.")
    check_output("out", args.out)
    check_output_file("record", args.record)
    rate = args.finetune_learning_rate
    if not 0 < rate < float("inf"):
        raise UsageError(f"`finetune_learning_rate` (={rate}) must be > 0.")
    if args.finetune_batch_size < 1:
        raise UsageError(
            f"`finetune_batch_size` (={args.finetune_batch_size}) must be >= 1."
        )
    for name in ("finetune_learning_rate", "finetune_batch_size"):
        value = getattr(args, name)
        if not args.finetune_epochs and value != getattr(Compress, name):
            raise UsageError(
                f"`{name}` (={value}) does nothing without `finetune_epochs`."
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
    if not args.tile_size:
        raise UsageError("`tile_size` must be one number, or several.")
    for name, values, least in (
        ("round_to", (args.round_to,), 1),
        ("channel_stride", (args.channel_stride,), 1),
        ("tile_size", args.tile_size, 2),
    ):
        for value in values:
            if value < least:
                raise UsageError(f"`{name}` (={value}) must be >= {least}.")
    for name in ("macs", "latency"):
        share = getattr(args, name)
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"`{name}` (={share}) must be in (0, 1].")


def check_layers(args: Compress, network: NetworkDescription) -> None:
    """Raises UsageError unless the glob matches a convolution of a network."""
    paths = [row.path for row in network.cost().rows if row.kind in CONVOLUTIONS]
    if not any(matches(path, args.layers) for path in paths):
        raise UsageError(
            f"`layers` (={args.layers}) matches no convolution of {network.path}, "
            f"which has {shortened(paths)}."
        )


def check_options_without_data(args: Compress) -> None:
    """Raises UsageError where an option is set that does nothing without data."""
    for name in _OF_DATA:
        value = getattr(args, name)
        if value != getattr(Compress, name):
            raise UsageError(
                f"`{name}` (={value}) does nothing without data; say which with --data."
            )


def _check_method(args: Compress) -> None:
    given = {name: getattr(args, name) for name in _METHODS}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise UsageError(
            "--ranks (for Tucker-2 factors), or --macs or --latency (for inertial "
            "layers) must be given."
        )
    if len(given) > 1:
        words = " and ".join(f"`{name}` (={value})" for name, value in given.items())
        raise UsageError(f"only one of {words} may be given.")
    if args.method is not None and args.is_inertial != (args.method == "inertial"):
        rule = (
            "inertial with --macs and --latency"
            if args.is_inertial
            else "hosvd or hooi with --ranks"
        )
        raise UsageError(f"`method` (={args.method}) must be {rule}.")
