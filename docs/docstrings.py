"""Has Sphinx show this library's docstrings and signatures as they are written.

The docstrings are plain text, in Google's form: what reStructuredText would take for
markup is escaped, indented blocks are set as code, and names in backticks are links
where they are public.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

import inertia_jax

_PUBLIC = {name: f"inertia_jax.{name}" for name in inertia_jax.__all__}
_PUBLIC |= {
    f"ops.{name}": f"inertia_jax.ops.{name}" for name in inertia_jax.ops.__all__
}


def setup(app: Sphinx) -> None:
    """Registers both parts with Sphinx."""
    # Before napoleon, which has 500.
    app.connect("autodoc-process-docstring", _to_restructured_text, priority=400)
    app.connect("autodoc-process-signature", _as_written)


def _to_restructured_text(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Changes the lines of a docstring in place."""
    blocks = re.split(r"\n\n+", "\n".join(lines))
    found: list[str] = []
    code_indent = 0
    for block in blocks:
        indent = _indent(block)
        is_section = re.match(r"[A-Z][a-z]+:\n", block)
        if code_indent and indent < code_indent:
            code_indent = 0
        if not code_indent and found and indent > _indent(found[-1].splitlines()[-1]):
            # The block before is no section, which a blank line does not follow.
            found.append(" " * _indent(found[-1]) + "::")
            code_indent = indent
        if code_indent or block.lstrip().startswith(">>>"):
            found.append(block)
        elif is_section and block.split("\n")[1].lstrip().startswith(">>>"):
            found.append(block)
        else:
            found.append(_prose(block))
    lines[:] = "\n\n".join(found).split("\n")


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _prose(text: str) -> str:
    """Returns a paragraph with everything escaped but what is in backticks."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            # A list's star is none; of arguments, napoleon escapes the stars itself.
            part = re.sub(r"(?<!^)([*|])|(?<=\w)(_)(?=\W|$)", r"\\\1\2", part)
            parts[i] = part.replace("\\\\", "\\")
        else:
            public = _PUBLIC.get(part.removeprefix("ij.").removeprefix("inertia_jax."))
            literal = f":py:obj:`{part} <{public}>`" if public else f"``{part}``"
            after = parts[i + 1]
            parts[i] = literal + ("\\ " if re.match(r"\w", after) else "")
    return "".join(parts)


def _as_written(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, *shown: str | None
) -> tuple[str | None, str | None] | None:
    """Returns arguments and result with the source text of their types."""
    if what in ("function", "method"):
        return _function(obj, skip_first=what == "method")
    if what != "class":
        return None
    if dataclasses.is_dataclass(obj) or issubclass(obj, tuple):
        return f"({', '.join(_fields(obj))})", None
    written = vars(obj).get("__init__")
    return None if written is None else _function(written, skip_first=True)


def _source(obj: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def _function(function: Any, *, skip_first: bool) -> tuple[str, str | None]:
    node = _source(inspect.unwrap(function))
    if skip_first and not isinstance(function, staticmethod):
        del node.args.args[0]
    result = node.returns and ast.unparse(node.returns).strip("'")
    return f"({ast.unparse(node.args)})", result


def _fields(cls: type) -> list[str]:
    """Returns the fields that a class is made of, those of its bases first."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("inertia_jax."):
            for node in _source(base).body:
                if isinstance(node, ast.AnnAssign):
                    found[ast.unparse(node.target)] = ast.unparse(node)
    return [found[name] for name in inspect.signature(cls).parameters if name in found]
