"""The configuration of a study."""

import dataclasses
from collections.abc import Collection, Mapping

from inertia_jax.ops.inertial.settings import near_miss
from train.errors import UsageError

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Smaller:
    """How a smaller network is made."""

    compress: tuple[str, ...]
    """Options of `compress`, such as ("--ranks", "budget:macs=0.5")."""
    start: str = DENSE
    """Name of the network that is compressed, as it is after its fine-tuning: the dense
    one, or a smaller one that stands before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A dense network, trained here or before, and smaller ones that are made from it.

    Every smaller network is fine-tuned, and all of them are evaluated and timed beside
    each other.
    """

    config: str | None = None
    """Configuration by which the dense network is trained: a file, or the name of a
    shipped one."""
    checkpoint: str | None = None
    """Checkpoint or run of the dense network, in place of `config`."""
    smaller: Mapping[str, Smaller]
    """The smaller networks, by name, in the order in which they are made."""
    compress: tuple[str, ...] = ()
    """Options that every `compress` has in common."""
    finetune: tuple[str, ...] = ()
    """Options of every `finetune`."""
    teacher: bool = False
    """Fine-tune with the dense network as teacher."""
    control: bool = False
    """Fine-tune the dense network in the same way, too."""
    export: tuple[str, ...] | None = None
    """Options of `export`, which writes each network for JAX alone, to report the size
    of the file; None: it is not written. Tiles need ("--batch-size", "64")."""
    against: tuple[str, ...] = ()
    """Programs in which networks are timed, too: torch, onnx, openvino."""
    device: str | None = None
    """Chip whose compiler estimates cycles; that needs the extra `tpu`."""

    def __post_init__(self) -> None:
        if bool(self.config) == bool(self.checkpoint):
            raise UsageError(
                f"`study` must have either `config` (={self.config}), by which the "
                f"dense network is trained, or its `checkpoint` (={self.checkpoint})."
            )
        known = [DENSE]
        for name, smaller in self.smaller.items():
            if name in (DENSE, "control") or not name.isidentifier():
                raise UsageError(
                    f"`smaller` has the name {name!r}; a name must be letters, digits "
                    f"and underscores, and neither dense nor control."
                )
            if smaller.start not in known:
                raise UsageError(
                    f"`start` (={smaller.start}) of {name} must be one of {known}, "
                    f"which stand before it."
                )
            known.append(name)

    def choose(self, only: Collection[str]) -> dict[str, Smaller]:
        """Returns the smaller networks that are named, all of them if none is.

        Raises:
            UsageError: A name is unknown, or lacks the one that it is made from.
        """
        for name in only:
            if name not in self.smaller:
                raise UsageError(
                    f"`only` (={name}) must be one of {', '.join(self.smaller)}."
                    f"{near_miss(name, self.smaller)}"
                )
            start = self.smaller[name].start
            if start not in (DENSE, *only):
                raise UsageError(f"`only` has {name} without {start}, its start.")
        return {n: s for n, s in self.smaller.items() if not only or n in only}
