"""Configurations as files: Python to read, JSON to keep and compare."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import typing
from typing import Any

from inertia_jax.ops.inertial.settings import near_miss
from train.config import Config
from train.errors import UsageError

Kind = typing.TypeVar("Kind")


def load_config(path: str | pathlib.Path) -> Config:
    """Reads the `config` of a Python file.

    Raises:
        UsageError: There is no such file, it raises an error, or it has no `config`.
    """
    return load_from_file(pathlib.Path(path), "config", Config)


def load_from_file(path: pathlib.Path, name: str, kind: type[Kind]) -> Kind:
    """Reads what a Python file defines as `name`.

    Args:
        path: The file, or the name of one that the program brings (`configs/`).
        name: The variable.
        kind: Its type.

    Raises:
        UsageError: There is no such file, it raises an error, or it does not define
            `name` of that kind.
    """
    path = _find_file(path, name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"`{name}` (={path}) must be a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:  # the file is the user's code and may raise anything
        raise UsageError(f"{path}: {type(error).__name__}: {error}.") from error
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        raise UsageError(
            f"{path} must define `{name}`, a {kind.__module__}.{kind.__name__}."
        )
    return value


def shipped_configs() -> pathlib.Path:
    """Returns the folder of the program's own configurations."""
    # In the wheel they are part of the program; in the checkout they lie beside it.
    program = pathlib.Path(__file__).parent
    inside = program / "configs"
    return inside if inside.is_dir() else program.parent / "configs"


def shipped_names(name: str) -> list[str]:
    """Returns the names of the program's own files that define `name`."""
    return sorted(file.stem for file in _shipped_folder(name).glob("[!_]*.py"))


def _shipped_folder(name: str) -> pathlib.Path:
    folders = {"config": "", "study": "studies"}
    return shipped_configs() / folders.get(name, f"{name}s")


def _find_file(path: pathlib.Path, name: str) -> pathlib.Path:
    """Returns a file, or the program's own that is named so, with or without `.py`."""
    if path.is_file():
        return path
    folder, known = _shipped_folder(name), shipped_names(name)
    stem = path.name.removesuffix(".py")
    # Pages name them from the checkout, as configs/NAME.py.
    places = {pathlib.Path(), "configs" / folder.relative_to(shipped_configs())}
    if path.parent in places and stem in known:
        return folder / f"{stem}.py"
    raise UsageError(
        f"there is no {name} file at {path}, and the program's own are "
        f"{', '.join(known)}.{near_miss(stem, known)}"
    )


def config_to_json(config: Config) -> dict[str, Any]:
    """Returns the configuration as JSON has it: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat_config(config: Config) -> dict[str, bool | int | float | str]:
    """Returns the configuration by its options' names; what is no number is text."""

    def flatten(fields: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in fields.items():
            if isinstance(value, dict):
                found |= flatten(value, f"{prefix}{name}.")
            else:
                is_plain = isinstance(value, bool | int | float | str)
                found[f"{prefix}{name}"] = value if is_plain else json.dumps(value)
        return found

    return flatten(config_to_json(config), "")


def fill_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON config with defaults for the fields that it lacks."""
    filled = {**defaults, **config}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(filled[name], dict):
            filled[name] = fill_defaults(filled[name], value)
    return filled


def without_places(config: dict[str, Any], *, has_names: bool = True) -> dict[str, Any]:
    """Returns a JSON config without the directories of the data on this machine.

    Args:
        config: The configuration, of which nothing is checked.
        has_names: Whether the name that a source has in its directory is left.
    """
    data = config.get("data")
    if not isinstance(data, dict):
        return config
    source = data.get("source")
    if not has_names:
        source = ""
    elif isinstance(source, str):
        path = source.removeprefix("npz:").removeprefix("imagefolder:")
        source = pathlib.PurePath(path).name
    return {**config, "data": {**data, "source": source, "cache_dir": ""}}


def differing_fields(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Returns `field: A there, B here` for each difference of two JSON configs.

    Of long values, such as plans and names of classes, it has the parts that differ.
    """
    if not (isinstance(a, dict) and isinstance(b, dict)):
        there, here = _differing_parts(repr(a), repr(b))
        return [] if a == b else [f"{prefix}: {there} there, {here} here"]
    join = f"{prefix}." if prefix else ""
    return [
        line
        for name in {**a, **b}
        for line in differing_fields(a.get(name), b.get(name), join + name)
    ]


def _differing_parts(*texts: str, most: int = 100) -> list[str]:
    """Returns texts, cut around the first difference where one of them is long."""
    if max(map(len, texts)) <= most:
        return list(texts)
    pairs = enumerate(itertools.zip_longest(*texts))
    first = next((place for place, letters in pairs if len(set(letters)) > 1), 0)
    start = max(0, first - most // 4)
    return [
        ("..." if start else "")
        + text[start : start + most]
        + ("..." if start + most < len(text) else "")
        for text in texts
    ]
