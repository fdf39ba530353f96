"""Whether another network was trained on images that a run holds out."""

from collections.abc import Mapping
from typing import Any

from train.config import Config, Data
from train.data import ImageSet
from train.data.held_out import check_as_trained, source_name
from train.errors import UsageError
from train.machine.processes import warn

# Fields of `Data` that say which images are test images.
_OF_TEST = ("test_share", "split_seed")


def check_held_out(
    name: str, config: Config, data: ImageSet, info: Mapping[str, Any]
) -> None:
    """Checks that a checkpoint was not trained on images that the run holds out.

    Raises:
        UsageError: It was trained on images that are the run's test images.
    """
    recorded = info.get("config")
    there = recorded.get("data") if isinstance(recorded, Mapping) else None
    if not isinstance(there, Mapping):
        return
    source = there.get("source")
    if source is None or source_name(source) != source_name(config.data.source):
        return
    try:
        check_as_trained(data.name, data.held_out, info, splits=("test",))
    except UsageError as error:
        own = (there.get(field, getattr(Data, field)) for field in _OF_TEST)
        raise UsageError(
            f"{name} was trained on images that this run holds out for tests, or on "
            f"another source of the name {source_name(source)}: its own "
            f"are those of `data.test_share` {next(own)} and `data.split_seed` "
            f"{next(own)}, in the images that it was trained with."
        ) from error
    try:
        check_as_trained(data.name, data.held_out, info, splits=("validation",))
    except UsageError:
        warn(
            f"{name} was trained on images that this run holds out for validation: "
            f"their accuracy is too high."
        )
