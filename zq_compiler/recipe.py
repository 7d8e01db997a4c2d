"""What to quantize and how: rules over dotted layer names, presets, JSON round trip."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .schemes import INT8_TOKEN, INT8_WEIGHT, ROTATED_TOKEN, ROTATED_WEIGHT, QScheme

RECIPE_VERSION = 1
PAIRS = ((ROTATED_WEIGHT, ROTATED_TOKEN), (INT8_WEIGHT, INT8_TOKEN))  # weight and input schemes that kernels take
TABLE_CHOICES = ("float", "int8")


@dataclass(frozen=True)
class QRule:
    """How the linear layers whose dotted name matches `pattern` are treated; the last matching rule wins.

    Args:
        pattern: regular expression, searched from the start of the name (`re.match`).
        weight, input: schemes, both given (quantized) or both None (left in float).
        optional: a rule that matches no layer is an error unless it is optional; presets' rules are.
        reason: why the layer is left in float, for the report.

    Raises:
        RecipeError: the pattern is no regular expression, or only one scheme is given.
    """

    pattern: str
    weight: QScheme | None = ROTATED_WEIGHT
    input: QScheme | None = ROTATED_TOKEN
    optional: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise RecipeError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        if (self.weight is None) != (self.input is None):
            raise RecipeError(
                f"rule {self.pattern!r} quantizes only one operand", fix="give both weight and input, or neither"
            )
        if self.weight is not None and (self.weight, self.input) not in PAIRS:
            raise RecipeError(
                f"rule {self.pattern!r}: no kernel takes {self.weight.describe()} x {self.input.describe()}",  # type: ignore[union-attr]
                fix=f"use {' or '.join(f'{w.describe()} x {x.describe()}' for w, x in PAIRS)}",
            )

    @classmethod
    def leave_float(cls, pattern: str, reason: str = "the recipe leaves it in float") -> QRule:
        """A rule that keeps the matching layers as they are."""
        return cls(pattern, weight=None, input=None, reason=reason)

    def matches(self, layer: str) -> bool:
        """Whether the rule speaks of this layer."""
        return re.match(self.pattern, layer) is not None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "pattern": self.pattern,
            "weight": self.weight.to_dict() if self.weight else None,
            "input": self.input.to_dict() if self.input else None,
            "optional": self.optional,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QRule:
        """The inverse of `to_dict`; unknown keys are errors."""
        _no_unknown_keys("rule", data, cls.__dataclass_fields__)
        if "pattern" not in data:
            raise RecipeError("rule lacks pattern")
        given = [k for k in ("weight", "input") if data.get(k) is not None]
        return cls(**{**data, **{k: QScheme.from_dict(data[k]) for k in given}})


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules, and the treatment of the vocabulary's tables.

    Args:
        name: shown in reports.
        rules: the last rule that matches a layer wins; a layer that no rule matches is left in float.
        embedding: `"float"`, or `"int8"` to store embedding tables row-wise in INT8.
        lm_head: `"float"`, or `"int8"` to quantize the projection onto the vocabulary like other linears.
        min_size: linears with fewer input or output features than this are left in float (INT8 loses there).

    >>> recipe = preset("w8a8").with_rules(QRule.leave_float(r"encoder\\.layer\\.11\\."))
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    name: str
    rules: tuple[QRule, ...]
    embedding: str = "float"
    lm_head: str = "float"
    min_size: int = 16
    version: int = field(default=RECIPE_VERSION)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for key in ("embedding", "lm_head"):
            if getattr(self, key) not in TABLE_CHOICES:
                raise RecipeError(f"{key}={getattr(self, key)!r}", fix=f"use one of {', '.join(TABLE_CHOICES)}")
        if not isinstance(self.min_size, int):
            raise RecipeError(f"min_size={self.min_size!r}", fix="use a number of features")
        if self.version != RECIPE_VERSION:
            raise RecipeError(
                f"recipe version {self.version} is not {RECIPE_VERSION}", fix="write it again with this package"
            )

    def rule_for(self, layer: str) -> QRule | None:
        """The rule that decides about this layer."""
        return next((rule for rule in reversed(self.rules) if rule.matches(layer)), None)

    def unmatched(self, layers: Iterable[str]) -> list[QRule]:
        """Rules that match none of the layers and are not optional: a typo, most often."""
        names = list(layers)
        return [r for r in self.rules if not r.optional and not any(r.matches(n) for n in names)]

    def with_rules(self, *rules: QRule) -> Recipe:
        """This recipe with more rules at the end, which win over the earlier ones."""
        return replace(self, rules=self.rules + rules)

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with other settings, for example `embedding="int8"`."""
        _no_unknown_keys("recipe", changes, self.__dataclass_fields__)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "version": self.version,
            "name": self.name,
            "embedding": self.embedding,
            "lm_head": self.lm_head,
            "min_size": self.min_size,
            "rules": [rule.to_dict() for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; unknown keys are errors."""
        _no_unknown_keys("recipe", data, cls.__dataclass_fields__)
        if missing := {"name", "rules"} - set(data):
            raise RecipeError(f"recipe lacks {', '.join(sorted(missing))}")
        if not isinstance(data["rules"], list | tuple):
            raise RecipeError(f"rules must be a list, got {data['rules']!r}")
        return cls(**{**data, "rules": tuple(QRule.from_dict(rule) for rule in data["rules"])})

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


PRESETS: dict[str, Recipe] = {
    "w8a8": Recipe("w8a8", (QRule(".*", ROTATED_WEIGHT, ROTATED_TOKEN, optional=True),)),
    "w8a8-plain": Recipe("w8a8-plain", (QRule(".*", INT8_WEIGHT, INT8_TOKEN, optional=True),)),
    "float": Recipe("float", ()),
}
DESCRIPTIONS = {
    "w8a8": "ZeroQuant W8A8: INT8 weights per output channel, INT8 activations per token, rotated, no calibration",
    "w8a8-plain": "the same without the rotation, as the paper has it: a little faster, less accurate",
    "float": "nothing quantized: the same pipeline, for comparison",
}


def preset(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        RecipeError: no such preset; the message lists the valid ones.
    """
    if name not in PRESETS:
        raise RecipeError(
            f"unknown recipe {name!r}",
            fix=f"use one of {', '.join(PRESETS)}, a Recipe, its dict, or the path of a recipe's JSON",
        )
    return PRESETS[name]


def list_recipes() -> dict[str, str]:
    """Names of the presets, each with one line of description."""
    return {name: DESCRIPTIONS[name] for name in PRESETS}


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """Whatever a user calls a recipe (a preset's name, a JSON path, a dict, a Recipe) as a Recipe.

    Raises:
        RecipeError: none of these, or malformed.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, str) and not recipe.endswith(".json"):
        return preset(recipe)
    if isinstance(recipe, str | Path):
        try:
            data = json.loads(Path(recipe).read_text())
        except OSError as error:
            raise RecipeError(f"cannot be read: {error.strerror}", where=str(recipe)) from None
        except ValueError as error:
            raise RecipeError(f"not JSON: {error}", where=str(recipe)) from None
        return Recipe.from_dict(data)
    raise RecipeError(f"a recipe cannot be a {type(recipe).__name__}", fix="give a name, a path, a dict or a Recipe")


def _no_unknown_keys(what: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"a {what} is a mapping, got {data!r}")
    if unknown := set(data) - set(known):
        raise RecipeError(f"unknown {what} key {', '.join(sorted(unknown))}", fix=f"use {', '.join(known)}")
