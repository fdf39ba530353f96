"""Command lines: words to the dataclass of a verb's options, in any usual spelling."""

import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro

from train.command import program

Options = typing.TypeVar("Options")

# The widest text that is read with ease; tyro itself fits all else to the terminal.
_WIDEST = 100


def parse_options(
    kind: type[Options],
    argv: Sequence[str],
    *,
    verb: str,
    default: Any = tyro.MISSING_NONPROP,
) -> Options:
    """Reads a verb's options; help, and options that are refused, end the program.

    What is on or off is taken in each of these spellings, whatever tyro makes of its
    type: `--flip`, `--flip True`, `--flip=True`, `--no-flip`, `--flip False`.

    Args:
        kind: The dataclass of the options.
        argv: The words after the verb.
        verb: The verb, and what comes before its options.
        default: The options before the words; without them, the defaults of `kind`.
    """
    return tyro.cli(
        kind,
        args=_with_switches(kind, argv),
        prog=f"{program()} {verb}",
        description=_description(kind),
        default=default,
    )


def optional(kind: type) -> Callable[[str], Any]:
    """Returns a type for `argparse` whose values may be None, as those of tyro."""

    def convert(word: str) -> Any:
        return None if word == "None" else kind(word)

    convert.__name__ = kind.__name__  # which the errors of `argparse` have
    return convert


def _description(kind: type) -> str:
    """Returns a docstring in lines that fit the terminal."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n")
    # Without the indent tyro would join the lines again.
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n\n".join(map(wrap.fill, paragraphs))


class _Switch(typing.NamedTuple):
    """An option that is on or off: its first spelling, and what tyro makes of it."""

    name: str
    takes_value: bool

    def words(self, value: str) -> list[str]:
        """Returns the words that tyro takes for True, False or None."""
        if self.takes_value:
            return [f"--{self.name}", value]
        return [f"--{self.name}" if value == "True" else f"--{_off(self.name)}"]


def _off(name: str) -> str:
    prefix, dot, last = name.rpartition(".")
    return f"{prefix}{dot}no-{last}"


def _with_switches(kind: type, argv: Sequence[str]) -> list[str]:
    """Returns the words with each option that is on or off spelt as tyro has it."""
    spellings = dict(_switches(kind))
    turned_off = {_off(name): switch for name, switch in spellings.items()}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("_", "-") if word[:2] == "--" else ""
        value = value.capitalize()
        if name in turned_off and not equals:
            words += turned_off[name].words("False")
        elif switch := spellings.get(name):
            known = ("True", "False", "None")[: 3 if switch.takes_value else 2]
            if not equals:
                follows = rest[0].capitalize() if rest else ""
                # Any other word is one of its own, such as a checkpoint.
                value = rest.pop(0).capitalize() if follows in known else "True"
            words += switch.words(value) if value in known else [word]
        else:
            words.append(word)
    return words


def _switches(kind: type, prefix: str = "") -> Iterator[tuple[str, _Switch]]:
    """Yields every spelling of every option that is on or off."""
    for field, hint in typing.get_type_hints(kind, include_extras=True).items():
        extras: list[Any] = []
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
        named = [e.name for e in extras if getattr(e, "name", None) is not None]
        name = f"{prefix}{(named or [field])[0]}".replace("_", "-")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _switches(hint, f"{name}." if name else "")
        elif hint in (bool, bool | None):
            switch = _Switch(name, takes_value=hint is not bool)
            aliases = [a for e in extras for a in getattr(e, "aliases", None) or ()]
            for spelling in (name, *(alias.removeprefix("--") for alias in aliases)):
                yield spelling, switch
