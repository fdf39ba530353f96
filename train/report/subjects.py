"""What a report is of: runs and checkpoints, and how each came to be."""

import collections
import dataclasses
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inertia_jax.metadata import load_metadata
from train.compress.options import Compress
from train.errors import UsageError
from train.networks import TrainedNetwork, read_network
from train.run.checkpoints import find_checkpoint, manifest_sha256
from train.run.lines import read_starts
from train.run.report import make_record


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """A step on the way to a network, which left a checkpoint or a run.

    Attributes:
        path: The checkpoint.
        info: What its metadata say of it; {} where it is no longer there.
        commands: The commands that made it: those of all starts of a run, or that of a
            compression, from its options. Nothing else records its command.
    """

    path: pathlib.Path
    info: Mapping[str, Any]
    commands: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A run or a checkpoint, as it is named in a report.

    Attributes:
        name: The name, which no other subject of the report has.
        path: The path that was given.
        record: The record of the run, as `make_record` returns it; None for a
            checkpoint.
        network: The network of the checkpoint, the best one of a run; None where a run
            has none.
        sha256: The hash of the checkpoint's manifest, which has those of its files.
        origins: The checkpoints that it was made from, the first one first, and itself.
    """

    name: str
    path: pathlib.Path
    record: Mapping[str, Any] | None
    network: TrainedNetwork | None
    sha256: str
    origins: tuple[Origin, ...]


def read_subjects(
    paths: Sequence[str],
    *,
    seconds_to: Sequence[float] = (),
    factory: str | None = None,
) -> list[Subject]:
    """Reads runs and checkpoints.

    Args:
        paths: Their directories.
        seconds_to: Accuracies in (0, 1], as `make_record` takes them.
        factory: What makes a network of the user's own where a checkpoint does not say
            it, as MODULE:FUNCTION.

    Raises:
        UsageError: There is neither a run nor a checkpoint at a path, or it is named
            twice, or what is there is broken.
    """
    resolved = [pathlib.Path(path).expanduser() for path in paths]
    twice = collections.Counter(path.absolute() for path in resolved).most_common(1)
    if twice and twice[0][1] > 1:
        raise UsageError(f"{twice[0][0]} must be named once; it is named again.")
    found = [_read(path, seconds_to=seconds_to, factory=factory) for path in resolved]
    names = collections.Counter(subject.name for subject in found)
    return [
        dataclasses.replace(subject, name=str(subject.path))
        if names[subject.name] > 1
        else subject
        for subject in found
    ]


def _read(
    path: pathlib.Path, *, seconds_to: Sequence[float], factory: str | None
) -> Subject:
    record = None
    is_checkpoint = (path / "metadata.json").is_file() or (path / "arrays").is_dir()
    if not is_checkpoint:
        record = make_record(path, seconds_to=seconds_to)
    network, sha256 = None, ""
    origins: tuple[Origin, ...] = ()
    if is_checkpoint or any((path / "checkpoints").glob("step_*")):
        network = read_network(find_checkpoint(path), fallback=factory)
        sha256 = manifest_sha256(network.path)
        origins = tuple(reversed([*_origins(network.path, network.info)]))
    name = record["config"]["name"] if record else _short_name(path)
    return Subject(name, path, record, network, sha256, origins)


def _short_name(path: pathlib.Path) -> str:
    """Returns the name of a checkpoint: that of its run and step, or of its folder."""
    path = path.absolute()
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}/{path.name}"
    return path.name


def _origins(path: pathlib.Path, info: Mapping[str, Any]) -> Iterator[Origin]:
    """Yields a checkpoint, the one that it was made from, and so on."""
    seen = set()
    while path.absolute() not in seen:
        seen.add(path.absolute())
        yield Origin(path, info, _commands(path, info))
        parent = parent_of(info)
        if parent is None:
            return
        path = pathlib.Path(parent).expanduser()
        try:
            path = find_checkpoint(path)
            info = load_metadata(path).info
        except (UsageError, OSError, ValueError):  # it was moved, or removed
            yield Origin(path, {}, ())
            return


def parent_of(info: Mapping[str, Any]) -> str | None:
    """Returns the checkpoint from which one was compressed or trained, if any."""
    # A compressed checkpoint has the configuration of the training before it, too.
    for key, name in (("compressed", "checkpoint"), ("config", "init")):
        options = info.get(key)
        if isinstance(options, Mapping):
            parent = options.get(name)
            return parent if isinstance(parent, str) else None
    return None


def _commands(path: pathlib.Path, info: Mapping[str, Any]) -> tuple[str, ...]:
    compressed = info.get("compressed")
    if isinstance(compressed, Mapping):
        return (compress_command(compressed),)
    starts = []
    if path.absolute().parent.name == "checkpoints":
        starts = read_starts(path.absolute().parents[1] / "run.jsonl")
    commands = [start.get("command") for start in starts]
    return tuple(command for command in commands if isinstance(command, str))


def compress_command(options: Mapping[str, Any]) -> str:
    """Returns the command of a compression, from the options that it recorded."""
    words = ["python", "-m", "train", "compress", str(options.get("checkpoint"))]
    for field in dataclasses.fields(Compress):
        value = options.get(field.name, field.default)
        if isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        if field.name == "checkpoint" or value == field.default:
            continue
        spelling = "model.factory" if field.name == "factory" else field.name
        spelling = spelling.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{spelling}" if value else f"--no-{spelling}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{spelling}", *map(str, values)]
    return shlex.join(words)
