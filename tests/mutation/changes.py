"""Small changes of the code: which there are, and files that have one."""

import ast
import collections
import contextlib
import hashlib
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = pathlib.Path(__file__).parents[2]
GROUPS = {
    "ops/conv": ["inertia_jax/ops/*.py", "inertia_jax/ops/conv/*.py"],
    "ops/inertial": ["inertia_jax/ops/inertial/*.py"],
    "ops/tucker": ["inertia_jax/ops/tucker/*.py"],
    "compression": ["inertia_jax/compression/*.py"],
    "checkpoints": [
        "inertia_jax/atomic.py",
        "inertia_jax/checkpoint.py",
        "train/run/checkpoints.py",
    ],
    "augmentation": [
        f"train/data/{name}.py" for name in ("augment", "mixing", "randaugment")
    ],
    "optimiser": ["train/step/optimizer.py", "train/step/train_step.py"],
}
# Unions of types are no arithmetic, and a decorator that is missed is no small change.
LEFT_OUT = ("core/ReplaceBinaryOperator_BitOr", "core/RemoveDecorator")


def all_mutants(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields every change of a file, by its place."""
    source = path.read_text()
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    nodes = list(ast_nodes(get_ast(source)))
    for name in cosmic_ray.plugins.operator_names():
        operator_class = cosmic_ray.plugins.get_operator(name)
        if name.startswith(LEFT_OUT) or operator_class.arguments():
            continue
        operator = operator_class()
        places = (at for node in nodes for at in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            yield {
                "file": str(path.relative_to(ROOT)),
                "text": digest,
                "line": start[0],
                "column": start[1],
                "operator": name,
                "occurrence": occurrence,
            }


def choose(patterns: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Returns one change at each of so many places, chosen by chance."""
    places = collections.defaultdict(list)
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            for mutant in all_mutants(path):
                place = mutant["file"], mutant["line"], mutant["column"]
                places[place].append(mutant)
    chance = random.Random(seed)
    chosen = []
    for place in chance.sample(sorted(places), len(places)):
        mutant = chance.choice(places[place])
        if len(chosen) < count and _is_code(apply(ROOT / mutant["file"], mutant)):
            chosen.append(mutant)
    return chosen


def apply(path: pathlib.Path, mutant: dict[str, Any]) -> str:
    """Returns a file's text with a change."""
    operator = cosmic_ray.plugins.get_operator(mutant["operator"])()
    text = mutate_code(path.read_text(), operator, mutant["occurrence"])
    assert text is not None
    return text


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)  # the marks of arguments `*` and `/` are operators, too
    except SyntaxError:
        return False
    return True


@contextlib.contextmanager
def changed(path: pathlib.Path, mutant: dict[str, Any]) -> Iterator[str]:
    """Changes a file within, and yields the changed line."""
    before, after = path.read_text(), apply(path, mutant)
    old, new = before.splitlines(), after.splitlines()
    differing = [b for a, b in zip(old, new, strict=False) if a != b]
    try:
        path.write_text(after)
        yield differing[0].strip() if differing else ""
    finally:
        path.write_text(before)
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()  # two changes within a second may have one size
