"""The plan: which kind of convolution stands at every layer of a network."""

import dataclasses
import fnmatch
import functools
import glob
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

from flax import linen as nn

from inertia_jax.plan.specs import (
    Conv,
    Fixed,
    Inertial,
    Rate,
    Spec,
    Threshold,
    Tucker2,
    core_of,
)

_JSON_TYPES = {cls.__name__: cls for cls in (*get_args(Spec), *get_args(Threshold))}


# The most rules that a plan's JSON holds. No network has as many layers.
_MOST_RULES = 10_000


def matches(path: str, pattern: str) -> bool:
    """Returns whether a glob matches the path of a layer, or is the path itself."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def as_glob(path: str) -> str:
    """Returns the glob that matches this path alone."""
    return glob.escape(path)


def _rests(pattern: str, prefix: str) -> list[str]:
    """Returns the globs of what follows a prefix in the paths that a glob matches."""
    rests = [pattern]
    for letter in prefix:
        rests = list(dict.fromkeys(r for rest in rests for r in _after(rest, letter)))
    return rests


def _after(pattern: str, letter: str) -> list[str]:
    """Returns the globs of what follows one letter."""
    tail = pattern.lstrip("*")
    # A `*` takes the letter, and may take more, or it has ended before.
    rests = [f"*{tail}"] if tail != pattern else []
    token = re.match(r"\[!?\]?[^]]*\]|.", tail, re.DOTALL)
    if token is not None and fnmatch.fnmatchcase(letter, token[0]):
        rests.append(tail[token.end() :])
    return rests


@dataclasses.dataclass(frozen=True)
class Plan:
    """An ordered list of rules `(glob, spec)`; the first that matches a layer wins.

    Globs are `fnmatch.fnmatchcase` over the layer's `/` path, and `*` crosses `/`. A
    whole path matches its layer, whatever characters are in it. A layer that no rule
    matches is an ordinary convolution. A plan is hashable and turns into JSON and back
    without loss.

    A network refuses a rule that matches none of its convolutions, and ranks that a
    layer cannot have. An `Inertial`, or the inertial core of a `Tucker2`, falls back to
    the ordinary convolution where the layer cannot hold it: where its core is larger
    than the network's filters, its reading is tiled and the layer has strides, or the
    layer of another's network is more than a plain convolution of two dimensions.
    `dropped_rules` lists these layers, `count_cost` notes them, and
    `create_model(strict=True)` refuses them.

    Attributes:
        rules: Pairs of a glob over layer paths and what stands there.

    Raises:
        ValueError: A rule is not a pair of a string and a spec.

    Example:
        >>> plan = ij.Plan((("conv2", ij.Tucker2(2, 3)), ("*", ij.Conv())))
        >>> plan.spec("conv2").rank_out
        3
        >>> ij.Plan.from_json(plan.to_json()) == plan
        True
    """

    rules: tuple[tuple[str, Spec], ...] = ()

    def __post_init__(self) -> None:
        rules = []
        for rule in self.rules:
            if not isinstance(rule, (tuple, list)) or len(rule) != 2:
                raise ValueError(
                    f"`rules` holds {rule!r:.200}; must be pairs (glob, spec)."
                )
            glob, spec = rule
            if not isinstance(glob, str) or not isinstance(spec, Spec):
                names = ", ".join(cls.__name__ for cls in get_args(Spec))
                raise ValueError(
                    f"`rules` holds {rule!r:.200}; must be a string and one of {names}."
                )
            rules.append((glob, spec))
        object.__setattr__(self, "rules", tuple(rules))

    def rule(self, path: str) -> tuple[str, Spec] | None:
        """Returns the rule that wins at the layer `path`; None if none matches it."""
        return next((r for r in self.rules if matches(path, r[0])), None)

    def spec(self, path: str) -> Spec:
        """Returns what the plan has for the layer `path`, e.g. `layer1_0/conv1`."""
        rule = self.rule(path)
        return Conv() if rule is None else rule[1]

    def gates(self, path: str) -> Inertial | None:
        """Returns the inertial convolution whose gates a layer, or its core, sows."""
        spec = self.spec(path)
        if not isinstance(spec, Inertial):
            spec = core_of(self.spec(path.removesuffix("/core")))
        return spec if isinstance(spec, Inertial) else None

    def above(self, path: Sequence[str]) -> "Plan":
        """Returns the plan of a network that has this one's as its part at a path."""
        prefix = as_glob("".join(f"{name}/" for name in path))
        return Plan(tuple((prefix + glob, spec) for glob, spec in self.rules))

    def below(self, path: Sequence[str]) -> "Plan":
        """Returns the plan of the part of a network at a path."""
        prefix = "".join(f"{name}/" for name in path)
        rules = [(rest, spec) for g, spec in self.rules for rest in _rests(g, prefix)]
        return Plan(tuple(rules))

    @property
    def inertial(self) -> tuple[Inertial, ...]:
        """The rules' inertial convolutions, also those that are cores."""
        specs = [core_of(spec) for _, spec in self.rules]
        return tuple(spec for spec in specs if isinstance(spec, Inertial))

    def without_ladders(self) -> "Plan":
        """Returns the plan with `capacities=None`: the same outputs, compiled sooner.

        If a network runs a few times only, ladders save less time than they take to
        compile.
        """
        without = functools.partial(dataclasses.replace, capacities=None)
        return self._with_inertial(without)

    def with_fixed_thresholds(self) -> "Plan":
        """Returns the plan whose thresholds no batch moves, not even in training mode.

        Their values are variables and stay; learned thresholds stay learned.
        """

        def fixed(spec: Inertial) -> Inertial:
            is_rate = isinstance(spec.threshold, Rate)
            threshold = Fixed() if is_rate else spec.threshold
            return dataclasses.replace(spec, threshold=threshold)

        return self._with_inertial(fixed)

    def _with_inertial(self, change: Callable[[Inertial], Inertial]) -> "Plan":
        """Returns the plan with its inertial layers and cores changed."""

        def changed(spec: Spec) -> Spec:
            if isinstance(spec, Tucker2) and isinstance(spec.core, Inertial):
                return dataclasses.replace(spec, core=change(spec.core))
            return change(spec) if isinstance(spec, Inertial) else spec

        return Plan(tuple((glob, changed(spec)) for glob, spec in self.rules))

    def __str__(self) -> str:
        if not self.rules:
            return "Plan: every layer Conv()"
        width = max(len(glob) for glob, _ in self.rules)
        lines = [f"  {glob:<{width}}  {spec}" for glob, spec in self.rules]
        return "\n".join(["Plan:", *lines])

    def to_json(self) -> str:
        """Returns the plan as one line of JSON, read back by `from_json`."""
        return json.dumps([[glob, _to_jsonable(spec)] for glob, spec in self.rules])

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The text is not JSON, or names a spec or field that is unknown.
        """
        try:
            return cls._from_rules(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"a plan must be JSON{_example()}; got {text!r:.120}: {error}."
            ) from error
        except RecursionError:
            raise ValueError(
                f"a plan must be JSON; got {text!r:.200}, nested too deep."
            ) from None

    @classmethod
    def _from_rules(cls, rules: Any) -> "Plan":
        if not isinstance(rules, list):
            raise ValueError(
                f"a plan must be a JSON list of rules{_example()}; got {rules!r:.120}."
            )
        if len(rules) > _MOST_RULES:
            raise ValueError(
                f"a plan must hold at most {_MOST_RULES:,} rules; it holds "
                f"{len(rules):,}."
            )
        for rule in rules:
            if not isinstance(rule, list) or len(rule) != 2:
                raise ValueError(
                    f"a plan holds {rule!r:.120}; must be pairs [glob, "
                    f"spec]{_example()}."
                )
        return cls(tuple((glob, _from_jsonable(spec)) for glob, spec in rules))


def _example() -> str:
    """Returns a short plan, as the text of JSON is in an error."""
    spec = {"type": "Inertial", "core_size": 3, "region_size": 5}
    return f", e.g. {json.dumps([['layer1_*', spec]])}"


def _to_jsonable(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = dataclasses.fields(value)
    values = {f.name: _to_jsonable(getattr(value, f.name)) for f in fields}
    return {"type": type(value).__name__, **values}


def _from_jsonable(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    if not isinstance(name, str) or name not in _JSON_TYPES:
        raise ValueError(
            f"a plan holds type {name!r:.200}; must be one of {sorted(_JSON_TYPES)}."
        )
    cls = _JSON_TYPES[name]
    fields = {key: _from_jsonable(v) for key, v in value.items() if key != "type"}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"a plan holds unknown fields {unknown!r:.200} of {name}.")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"a plan's {name} is incomplete: {error}.") from error


def plan_of(model: nn.Module) -> Plan | None:
    """Returns the plan of a network of this library or a `Planned`; else None."""
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, Plan) else None


def without_ladders(model: nn.Module) -> nn.Module:
    """Returns the model with layers that compile sooner, where a plan makes them."""
    plan = plan_of(model)
    return model if plan is None else model.clone(plan=plan.without_ladders())
