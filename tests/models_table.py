"""Writes the tables of docs/models.md: what becomes of the models of the tests.

    python tests/models_table.py [NAME ...]

With names, the rows of these models alone are made.
"""

import collections
import pathlib
import re
import sys
import tempfile

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parent / "docs" / "models.md"
COLUMNS = (
    *("model", "factorised", "stays, and why", "parameters left"),
    *("equal", "gradients", "file"),
)


def row(name, outcome):
    """Returns a model's row of the table."""
    reasons = dict(outcome.kept)
    reasons |= dict.fromkeys(outcome.dearer, "would cost more in factors")
    paths = collections.defaultdict(list)
    for path in outcome.compressed:
        paths[""].append(path)
    for path, reason in reasons.items():
        paths[reason].append(path)
    listed = {reason: _globs(own, paths) for reason, own in paths.items()}
    factorised = listed.pop("", "")
    stays = "; ".join(f"{layers}: {reason}" for reason, layers in listed.items())
    file = (
        "none" if outcome.export_error is None else _said(outcome.export_error < 1e-4)
    )
    cells = (
        *(f"`{name}`", factorised, stays, f"{outcome.params:.0%}"),
        *(_said(outcome.full_error < 1e-4), _said(outcome.is_trained), file),
    )
    return f"| {' | '.join(cells)} |"


def _globs(own, paths):
    """Returns paths, with a `*` for numbers where all such layers fare alike."""
    alike = collections.Counter(_starred(path) for path in own)
    every = collections.Counter(_starred(p) for found in paths.values() for p in found)
    names = [
        star if 1 < alike[star] == every[star] else path
        for path, star in zip(own, map(_starred, own), strict=True)
    ]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _starred(path):
    return re.sub(r"\d+", "*", path)


def _said(is_so):
    return "yes" if is_so else "**no**"


def _made(title, face, name):
    """Returns the row of a model."""
    from outcomes import init_linen, init_module, outcome_of

    print(f"{title}: {name}", file=sys.stderr)
    (model, shape), call = face.MODELS[name], face.CALLS.get(name)
    is_linen = title == "Linen"
    network = init_linen(model, shape, call) if is_linen else init_module(model)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file"
        return row(name, outcome_of(network, shape, path, call=call))


def main(wanted):
    """Writes the tables; what stands before them stays."""
    import nnx_zoo
    import zoo

    text, _, tables = PAGE.read_text().partition("## Linen")
    lines = [text.rstrip(), ""]
    own = dict(zip(("Linen", "NNX"), tables.split("## NNX"), strict=False))
    for title, face in (("Linen", zoo), ("NNX", nnx_zoo)):
        lines += [f"## {title}", "", f"| {' | '.join(COLUMNS)} |"]
        lines += ["|" + "---|" * len(COLUMNS)]
        for name in face.MODELS:
            known = re.search(rf"^\| `{name}` .*$", own.get(title, ""), re.MULTILINE)
            is_wanted = not wanted or name in wanted or known is None
            lines.append(_made(title, face, name) if is_wanted else known[0])
        lines.append("")
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    sys.path += [str(TESTS.parent), str(TESTS / "nnx")]
    main(sys.argv[1:])
