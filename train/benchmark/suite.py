"""What the suites of `python -m train benchmark` share: options, and their data."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from train.config import Config, Data
from train.data import ImageSet, load_data
from train.errors import user_input


@dataclasses.dataclass(frozen=True)
class BaseSuite:
    """A suite; its fields are its options."""

    out: str | None = None
    """File for the record, as JSON."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measures, prints what it found, and yields it for the record."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NetworkSuite(BaseSuite):
    """A suite that measures one network after the other."""

    models: tuple[Literal["resnet18", "vgg16", "simpledla"], ...] = (
        "resnet18",
        "vgg16",
        "simpledla",
    )
    """Networks to measure."""
    batch_size: int = 64
    """Images a call."""
    width: float = 1.0
    """Width of the networks."""
    against: Literal["none", "torch"] = "none"
    """torch: the same networks in PyTorch, in turn."""

    def each_model(
        self,
        measure: Callable[..., dict[str, Any]],
        describe: Callable[[dict[str, Any]], str],
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """Yields what `measure` finds of each network, and prints it as described."""
        for name in self.models:
            with user_input():
                row = measure(
                    name,
                    width=self.width,
                    against_torch=self.against == "torch",
                    **options,
                )
            print(describe(row), flush=True)
            yield row

    @property
    def both_batches(self) -> tuple[int, ...]:
        """Batches of one image and of `batch_size`."""
        return tuple(sorted({1, self.batch_size}))


def with_source(config: Config, source: str | None) -> Config:
    """Returns a configuration with another data source; None keeps its own."""
    if source is None:
        return config
    data = dataclasses.replace(config.data, source=source)
    return dataclasses.replace(config, data=data)


def load_images(data: Data) -> ImageSet:
    """Loads a configuration's data."""
    return load_data(data.source, cache_dir=data.cache_dir, image_size=data.load_size)
