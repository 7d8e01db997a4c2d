"""What to quantize and how: rules over dotted layer names, presets, JSON round trip."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .formats import NIBBLES, WITHIN_E4M3
from .methods import GPTQ, LKD, LoRC
from .schemes import (
    FP8_TENSOR,
    FP8_TOKEN,
    FP8_WEIGHT,
    INT4_TOKEN,
    INT8_FEATURE,
    INT8_TENSOR,
    INT8_TOKEN,
    INT8_WEIGHT,
    ROTATED_TOKEN,
    ROTATED_WEIGHT,
    Granularity,
    QScheme,
)

RECIPE_VERSION = 2
LORC_RANK = 8  # ZeroQuant-V2's
_OF_WEIGHTS = (Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.PER_GROUP)
# Weight and input schemes that kernels take, beside those of packed weights (`_packed_weight`). An attention has no
# weight. A weight alone may have any format.
PAIRS = (
    (ROTATED_WEIGHT, ROTATED_TOKEN),
    *((INT8_WEIGHT, scheme) for scheme in (INT8_TOKEN, INT8_FEATURE, INT8_TENSOR)),
    (FP8_WEIGHT, FP8_TOKEN),
    (None, INT8_TENSOR),
)
CHOICES = ("float", "int8")
SOFTMAX = ("token", "static", "static_signed")
DTYPES = ("float32", "float16", "bfloat16")
RANGE_METHODS = ("max_abs", "percentile", "mse", "entropy")
# What may choose a weight's codes in place of rounding to the nearest, in the order in which they are applied.
WEIGHT_METHODS = ("clip", "gptq", "lkd", "bias")
METHODS_WITH_DATA = ("gptq", "lkd", "bias")


class Role(StrEnum):
    """What a layer does in a transformer block, read off the graph around it."""

    QUERY_KEY_VALUE = "query_key_value"  # linears that feed an attention
    ATTENTION = "attention"  # the two products and the softmax
    ATTENTION_OUTPUT = "attention_output"  # the linear that reads an attention's result
    FEED_FORWARD_IN = "feed_forward_in"  # FC1: linears that feed an activation function, gates too
    FEED_FORWARD_OUT = "feed_forward_out"  # FC2: the linear that reads an activation function's result
    OTHER = "other"  # any other linear


def _role(value: Any) -> Role:
    try:
        return Role(value)
    except ValueError:
        raise RecipeError(f"unknown role {value!r}", fix=f"use one of {', '.join(r.value for r in Role)}") from None


def _several(given: Any, what: str, pattern: str) -> tuple[Any, ...]:
    """One name, or several."""
    if not isinstance(given, Iterable):
        raise RecipeError(f"rule {pattern!r}: {what}={given!r}", fix="use a list of names")
    return (given,) if isinstance(given, str) else tuple(given)


def _packed_weight(weight: QScheme | None, input: QScheme | None) -> bool:
    """Whether it is a product of a packed weight: of integers (W4A8, W4A4), or of FP8 activations."""
    if weight is None or input is None or not _is_of_weights(weight) or weight.rotated != input.rotated:
        return False
    if input in (FP8_TOKEN, FP8_TENSOR):
        return weight.format in WITHIN_E4M3
    return replace(input, rotated=False) in (INT8_TOKEN, INT4_TOKEN) and weight.format in NIBBLES


def _weight_alone(weight: QScheme | None, input: QScheme | None) -> bool:
    return weight is not None and input is None and _is_of_weights(weight) and not weight.rotated


def _is_of_weights(scheme: QScheme) -> bool:
    return scheme.granularity in _OF_WEIGHTS and not scheme.dynamic


def _describe(scheme: QScheme | None) -> str:
    return scheme.describe() if scheme is not None else "float"


@dataclass(frozen=True)
class QRule:
    """How the layers whose dotted name matches `pattern` are treated; the last matching rule wins.

    Args:
        pattern: regular expression, searched from the start of the name (`re.match`).
        weight, input: schemes, both given (quantized), the weight's alone (dequantized in front of a float product) or
            both None (left in float). A rule for attentions has an input scheme only, for query, key and value.
        output: `INT8_FEATURE` where a linear writes integers (ZeroQuant-HERO's GeMM^quant), or None for floats.
        roles: of the layers that the rule speaks of; empty for all linears.
        optional: a rule that matches no layer is an error unless it is optional; presets' rules are.
        reason: why the layer is left in float, for the report.
        lorc_rank: of the low-rank compensation of the weight's error (LoRC; ZeroQuant-V2); 0 for none, `"auto"` for
            what the recipe's `lorc` settings ask for.
        methods: that choose the weight's codes instead of rounding to the nearest: `"clip"` (scales of least squared
            error), `"gptq"`, `"lkd"`, and `"bias"`, which moves the bias by the mean error of the outputs.
        smooth: alpha of SmoothQuant where a linear reads a norm, from 0 to 1, or `"search"` for the best of 21; or
            None.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`: in place of schemes, the float dtype that the layers run in,
            their weights stored in it. Norms and activation functions between them keep the model's dtype.

    Raises:
        RecipeError: the pattern is no regular expression, only one scheme is given, or a dtype beside schemes.

    >>> QRule(r"encoder\\.layer\\.11\\.", dtype="bfloat16").weight is None
    True
    """

    pattern: str
    weight: QScheme | None = ROTATED_WEIGHT
    input: QScheme | None = ROTATED_TOKEN
    output: QScheme | None = None
    roles: tuple[Role, ...] = ()
    optional: bool = False
    reason: str = ""
    dtype: str | None = None
    lorc_rank: int | str = 0
    methods: Iterable[str] = ()
    smooth: float | str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise RecipeError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        object.__setattr__(self, "roles", tuple(_role(role) for role in _several(self.roles, "roles", self.pattern)))
        if self.dtype is not None:
            self._take_dtype()
        for_attention = self.roles == (Role.ATTENTION,)
        if self.weight is None and self.input is not None and not for_attention:
            raise RecipeError(
                f"rule {self.pattern!r} quantizes the input only",
                fix='give a weight too, or neither; for attentions, input and roles=("attention",)',
            )
        if self.output is not None and self.input is None:
            raise RecipeError(f"rule {self.pattern!r} quantizes only the output", fix="give weight and input too")
        given = self.weight, self.input
        known = given in PAIRS or _packed_weight(*given) or _weight_alone(*given) or self.leaves_float
        if not known or (for_attention and self.weight is not None):
            pairs = " or ".join(f"{_describe(w)} x {_describe(x)}" for w, x in PAIRS)
            raise RecipeError(
                f"rule {self.pattern!r}: no kernel takes {_describe(self.weight)} x {_describe(self.input)}",
                fix=f"use {pairs}, a weight of {', '.join(NIBBLES)} with INT8 or INT4 per token, of"
                f" {', '.join(WITHIN_E4M3)} with FP8 per token or tensor, or a weight per tensor, row or group alone",
            )
        self._check_methods()
        if self.output not in (None, INT8_FEATURE):
            raise RecipeError(
                f"rule {self.pattern!r}: no kernel writes {_describe(self.output)}",
                fix=f"use output={_describe(INT8_FEATURE)} or None",
            )

    def _check_methods(self) -> None:
        rank = self.lorc_rank
        if rank != "auto" and (type(rank) is not int or rank < 0):
            raise RecipeError(f"rule {self.pattern!r}: lorc_rank={rank!r}", fix="use a number of ranks, 0 or 'auto'")
        methods = _several(self.methods, "methods", self.pattern)
        if unknown := [method for method in methods if method not in WEIGHT_METHODS]:
            fix = f"use some of {', '.join(WEIGHT_METHODS)}"
            raise RecipeError(f"rule {self.pattern!r}: unknown method {unknown[0]!r}", fix=fix)
        if "clip" in methods and self.weight is not None and self.weight.scale_constraint != "none":
            fix = "leave clip out, or set scale_constraint='none'"
            raise RecipeError(f"rule {self.pattern!r}: clip would break the constraint on scales", fix=fix)
        object.__setattr__(self, "methods", tuple(method for method in WEIGHT_METHODS if method in methods))
        smooth = self.smooth
        if smooth not in (None, "search") and not (type(smooth) in (int, float) and 0 <= smooth <= 1):  # type: ignore[operator]
            raise RecipeError(f"rule {self.pattern!r}: smooth={smooth!r}", fix="use 0 to 1, 'search' or None")
        if (rank or methods or smooth is not None) and self.weight is None:
            fix = "give a weight scheme, or set lorc_rank=0, methods=() and smooth=None"
            raise RecipeError(f"rule {self.pattern!r}: there is no quantized weight to improve", fix=fix)

    def _take_dtype(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise RecipeError(f"rule {self.pattern!r}: dtype={dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
        if (self.weight, self.input) not in ((ROTATED_WEIGHT, ROTATED_TOKEN), (None, None)):  # the defaults, or none
            raise RecipeError(f"rule {self.pattern!r} gives schemes and a dtype", fix="give one of them")
        for name, value in (("dtype", dtype), ("weight", None), ("input", None)):
            object.__setattr__(self, name, value)
        if not self.reason:
            object.__setattr__(self, "reason", f"the recipe runs it in {dtype}")

    @classmethod
    def leave_float(
        cls, pattern: str, reason: str = "the recipe leaves it in float", roles: Iterable[Role | str] = ()
    ) -> QRule:
        """A rule that keeps the matching layers as they are; without roles, attentions and norms too."""
        return cls(pattern, weight=None, input=None, reason=reason, roles=roles)  # type: ignore[arg-type]

    @property
    def leaves_float(self) -> bool:
        """Whether it quantizes nothing."""
        return self.weight is None and self.input is None

    def matches(self, layer: str, role: Role = Role.OTHER) -> bool:
        """Whether the rule speaks of this layer."""
        of_kind = role in self.roles if self.roles else role is not Role.ATTENTION or self.leaves_float
        return of_kind and re.match(self.pattern, layer) is not None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "pattern": self.pattern,
            "weight": self.weight.to_dict() if self.weight else None,
            "input": self.input.to_dict() if self.input else None,
            "output": self.output.to_dict() if self.output else None,
            "lorc_rank": self.lorc_rank,
            "methods": list(self.methods),
            "smooth": self.smooth,
            "dtype": self.dtype,
            "roles": [role.value for role in self.roles],
            "optional": self.optional,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QRule:
        """The inverse of `to_dict`; unknown keys are errors."""
        _no_unknown_keys("rule", data, cls.__dataclass_fields__)
        if "pattern" not in data:
            raise RecipeError("rule lacks pattern")
        given = [k for k in ("weight", "input", "output") if data.get(k) is not None]
        return cls(**{**data, **{k: QScheme.from_dict(data[k]) for k in given}})


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules, and the treatment of the vocabulary's tables.

    Args:
        name: shown in reports.
        rules: the last rule that matches a layer wins; a layer that no rule matches is left in float.
        embedding: `"float"`, or `"int8"` to store embedding tables row-wise in INT8.
        lm_head: `"float"`, or `"int8"` to quantize the projection onto the vocabulary like other linears.
        residual: `"int8"` has a block add the integers of a norm's output, not its floats, to the next sublayer's.
        softmax: `"token"` quantizes probabilities in steps of a 255th of each row's largest; `"static"` with one
            calibrated scale, as the paper has it; `"static_signed"` with one that leaves half of the levels unused,
            for runtimes whose integers are signed (TensorRT).
        range_method: how calibrated ranges are chosen: `"max_abs"`, `"percentile"`, `"mse"` or `"entropy"`.
        min_size: linears with fewer input or output features than this are left in float (INT8 loses there).
        gptq, lkd, lorc: settings of the methods that rules name.

    >>> recipe = preset("w8a8").with_rules(QRule.leave_float(r"encoder\\.layer\\.11\\."))
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    name: str
    rules: tuple[QRule, ...]
    embedding: str = "float"
    lm_head: str = "float"
    residual: str = "float"
    softmax: str = "token"
    range_method: str = "max_abs"
    min_size: int = 16
    gptq: GPTQ = field(default_factory=GPTQ)
    lkd: LKD = field(default_factory=LKD)
    lorc: LoRC = field(default_factory=LoRC)
    version: int = field(default=RECIPE_VERSION)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for key in ("embedding", "lm_head", "residual"):
            if getattr(self, key) not in CHOICES:
                raise RecipeError(f"{key}={getattr(self, key)!r}", fix=f"use one of {', '.join(CHOICES)}")
        if self.softmax not in SOFTMAX:
            raise RecipeError(f"softmax={self.softmax!r}", fix=f"use one of {', '.join(SOFTMAX)}")
        if self.range_method not in RANGE_METHODS:
            raise RecipeError(f"range_method={self.range_method!r}", fix=f"use one of {', '.join(RANGE_METHODS)}")
        for key, kind in _SETTINGS.items():
            if not isinstance(getattr(self, key), kind):
                raise RecipeError(f"{key}={getattr(self, key)!r}", fix=f"use {kind.__name__}(...)")
        undone = [rule.pattern for rule in self.rules if rule.lorc_rank and {"gptq", "lkd"} & set(rule.methods)]
        if self.lorc.refinements and undone:
            what = f"rule {undone[0]!r}: refinements of LoRC round weights to the nearest, which undoes gptq and lkd"
            raise RecipeError(what, fix="set refinements=0, or leave those methods out")
        if type(self.min_size) is not int:
            raise RecipeError(f"min_size={self.min_size!r}", fix="use a number of features")
        if self.version != RECIPE_VERSION:
            raise RecipeError(
                f"recipe version {self.version} is not {RECIPE_VERSION}", fix="write it again with this package"
            )

    def rule_for(self, layer: str, role: Role = Role.OTHER) -> QRule | None:
        """The rule that decides about this layer."""
        return next((rule for rule in reversed(self.rules) if rule.matches(layer, role)), None)

    def unmatched(self, layers: Mapping[str, Role]) -> list[QRule]:
        """Rules that match none of the layers (name -> role) and are not optional: a typo, most often."""
        return [r for r in self.rules if not r.optional and not any(r.matches(*layer) for layer in layers.items())]

    @property
    def calibrated(self) -> bool:
        """Whether a rule has static scales of activations, which calibration data must give."""
        schemes = [scheme for rule in self.rules for scheme in (rule.input, rule.output)]
        return any(scheme is not None and scheme.calibrated for scheme in schemes)

    @property
    def needs_data(self) -> bool:
        """Whether it cannot be applied without calibration data: for static scales, or for a method."""
        return self.calibrated or bool(self.methods_with_data)

    @property
    def methods_with_data(self) -> list[str]:
        """Names of the methods that read batches of calibration data, which statistics cannot stand for."""
        rules = self.rules
        methods = [method for method in METHODS_WITH_DATA if any(method in rule.methods for rule in rules)]
        smooth = ["smooth"] if any(rule.smooth is not None for rule in rules) else []
        weighted = ["weighted lorc"] if self.lorc.weighted and any(rule.lorc_rank for rule in rules) else []
        return [*smooth, *methods, *weighted]

    @property
    def quantizes_attention(self) -> bool:
        """Whether a rule speaks of attentions."""
        return any(Role.ATTENTION in rule.roles for rule in self.rules)

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
            "residual": self.residual,
            "softmax": self.softmax,
            "range_method": self.range_method,
            "min_size": self.min_size,
            **{key: getattr(self, key).to_dict() for key in _SETTINGS},
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
        settings = {key: kind.from_dict(data[key]) for key, kind in _SETTINGS.items() if key in data}
        return cls(**{**data, **settings, "rules": tuple(QRule.from_dict(rule) for rule in data["rules"])})

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


_SETTINGS: dict[str, Any] = {"gptq": GPTQ, "lkd": LKD, "lorc": LoRC}
_TOKEN_WISE_ROLES = (Role.QUERY_KEY_VALUE, Role.FEED_FORWARD_IN, Role.OTHER)


def _hero(name: str, *rules: QRule) -> Recipe:
    """A mode of ZeroQuant-HERO: M1 and what it adds. What has no rule stays in float."""
    token_wise = QRule(".*", ROTATED_WEIGHT, ROTATED_TOKEN, roles=_TOKEN_WISE_ROLES, optional=True)
    return Recipe(name, (token_wise, *rules), embedding="int8", residual="int8")


def _feature_wise(role: Role) -> QRule:
    return QRule(".*", INT8_WEIGHT, INT8_FEATURE, INT8_FEATURE, roles=(role,), optional=True)


_INT8_ATTENTION = QRule(".*", None, INT8_TENSOR, roles=(Role.ATTENTION,), optional=True)
_M2 = (_INT8_ATTENTION, _feature_wise(Role.ATTENTION_OUTPUT))
# The product in a gated MLP has tails in every feature: for those, a scale known beforehand is too coarse for the rest
# (docs/hero.md).
_TOKEN_WISE_FC2 = QRule(".*", ROTATED_WEIGHT, ROTATED_TOKEN, roles=(Role.FEED_FORWARD_OUT,), optional=True)


def _hero_tensorrt(name: str, *rules: QRule) -> Recipe:
    """A mode whose attentions TensorRT fuses in INT8: it knows signed integers, and one scale for an activation."""
    token_wise = QRule(".*", INT8_WEIGHT, INT8_TOKEN, roles=_TOKEN_WISE_ROLES, optional=True)
    context = QRule(".*", INT8_WEIGHT, INT8_TENSOR, INT8_FEATURE, roles=(Role.ATTENTION_OUTPUT,), optional=True)
    return Recipe(name, (token_wise, _INT8_ATTENTION, context, *rules), residual="int8", softmax="static_signed")


def _weights_alone(name: str, format: str, group: int) -> Recipe:
    shared = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    return Recipe(name, (QRule(".*", QScheme(format, shared, group), None, optional=True),))


_WEIGHTS_ALONE = {
    "w8a16": ("int8", 0),
    "w4a16-g64": ("int4", 64),
    "w4a16-g128": ("int4", 128),
    "w3a16-g64": ("int3", 64),
    "w4a16-g64-asym": ("int4_asym", 64),
    "w2a16-g64-asym": ("int2_asym", 64),
    "fp6": ("fp6_e3m2", 0),
}


def _w4a8(name: str, group: int = 0, roles: tuple[Role, ...] = (), bits: int = 8) -> Recipe:
    """INT4 weights and integers per token; in other roles than the given ones, if any are, INT8 weights.

    What has one scale a row is rotated; scales of groups are fine enough, and do better without (docs/weights.md).
    """
    shared = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    token = replace(INT8_TOKEN if bits == 8 else INT4_TOKEN, rotated=not group)
    int4 = QRule(".*", QScheme("int4", shared, group, rotated=not group), token, roles=roles, optional=True)
    int8 = QRule(".*", ROTATED_WEIGHT, ROTATED_TOKEN, optional=True)
    return Recipe(name, (int8, int4) if roles else (int4,))


def _w4a8_fp(name: str, constraint: str = "none") -> Recipe:
    weight = QScheme("fp4_e2m1", Granularity.PER_GROUP, 128, scale_constraint=constraint)
    return Recipe(name, (QRule(".*", weight, FP8_TOKEN, optional=True),))


PRESETS: dict[str, Recipe] = {
    "w8a8": Recipe("w8a8", (QRule(".*", ROTATED_WEIGHT, ROTATED_TOKEN, optional=True),)),
    "w8a8-plain": Recipe("w8a8-plain", (QRule(".*", INT8_WEIGHT, INT8_TOKEN, optional=True),)),
    "hero-m1": _hero("hero-m1"),
    "hero-m2": _hero("hero-m2", *_M2),
    "hero-m3": _hero("hero-m3", *_M2, _feature_wise(Role.FEED_FORWARD_OUT)),
    "hero-m2-tensorrt": _hero_tensorrt("hero-m2-tensorrt"),
    "hero-m3-tensorrt": _hero_tensorrt("hero-m3-tensorrt", _feature_wise(Role.FEED_FORWARD_OUT)),
    "hero-decoder": _hero("hero-decoder", *_M2, _TOKEN_WISE_FC2),
    **{name: _weights_alone(name, *scheme) for name, scheme in _WEIGHTS_ALONE.items()},
    "fp8-static": Recipe("fp8-static", (QRule(".*", FP8_WEIGHT, FP8_TENSOR, optional=True),)),
    "fp8": Recipe("fp8", (QRule(".*", FP8_WEIGHT, FP8_TOKEN, optional=True),)),
    "w4a8": _w4a8("w4a8"),
    "w4a8-g128": _w4a8("w4a8-g128", 128),
    "w48a8": _w4a8("w48a8", roles=(Role.FEED_FORWARD_IN, Role.FEED_FORWARD_OUT)),
    "w4a4": _w4a8("w4a4", bits=4),
    "w4a8-fp": _w4a8_fp("w4a8-fp"),
    "w4a8-fp-m1": _w4a8_fp("w4a8-fp-m1", "pow2"),
    "w4a8-fp-m2": _w4a8_fp("w4a8-fp-m2", "group_pow2"),
    "float": Recipe("float", ()),
}
DESCRIPTIONS = {
    "w8a8": "ZeroQuant W8A8: INT8 weights per output channel, INT8 activations per token, rotated, no calibration",
    "w8a8-plain": "the same without the rotation, as the paper has it: a little faster, less accurate",
    "hero-m1": "ZeroQuant-HERO M1: embedding, Q/K/V and FC1 in INT8 per token, residual in INT8; no calibration",
    "hero-m2": "M1 with attention and its output projection in INT8, on calibrated scales",
    "hero-m3": "M2 with GELU and FC2 in INT8: activations travel as integers throughout",
    "hero-m2-tensorrt": "M2 as TensorRT fuses it: no rotations, signed probabilities, one scale for its result",
    "hero-m3-tensorrt": "M3 in the same way",
    "hero-decoder": "M2 with FC2 in INT8 per token: every linear and attention of a decoder with a gated MLP",
    "w8a16": "INT8 weights per output channel, activations in float: for decoding, which is bound by reading weights",
    "w4a16-g64": "the same in INT4, a scale for 64 input features (ZeroQuant-V2's fine-grained quantization)",
    "w4a16-g128": "the same, a scale for 128",
    "w3a16-g64": "the same in INT3, a scale for 64",
    "w4a16-g64-asym": "INT4 with a scale and an integer zero point for 64 input features",
    "w2a16-g64-asym": "INT2 in the same way: for GPTQ or LKD to make something of",
    "fp6": "FP6 E3M2 weights per output channel (ZeroQuant(4+2))",
    "fp8-static": "FP8 E4M3 weights per output channel, activations with one calibrated scale a tensor",
    "fp8": "FP8 E4M3 weights per output channel and activations per token (ZeroQuant-FP)",
    "w4a8": "INT4 weights per output channel, INT8 activations per token, rotated (ZeroQuant's W4A8)",
    "w4a8-g128": "the same with a scale for 128 input features, and not rotated",
    "w48a8": "ZeroQuant's W4/8A8: INT4 weights in the MLP, INT8 weights in attention and elsewhere",
    "w4a4": "INT4 weights per output channel, INT4 activations per token: accuracy to look at, no speed to gain",
    "w4a8-fp": "FP4 E2M1 weights, a scale for 128 input features, FP8 E4M3 activations per token (ZeroQuant-FP)",
    "w4a8-fp-m1": "the same, each scale a power of two (ZeroQuant-FP's M1)",
    "w4a8-fp-m2": "the same, scales of a row powers of two times its largest (M2): FP4 is FP8 by an exponent shift",
    "float": "nothing quantized: the same pipeline, for comparison",
}


def preset(name: str) -> Recipe:
    """A recipe by name, with methods behind it: `w4a16-g64+gptq+lorc`, or `+lorc32` for another rank than 8.

    Raises:
        RecipeError: no such preset; the message lists the valid ones.
    """
    base, *methods = name.split("+")
    if base not in PRESETS:
        raise RecipeError(
            f"unknown recipe {name!r}",
            fix=f"use one of {', '.join(PRESETS)}, a Recipe, its dict, or the path of a recipe's JSON",
        )
    recipe = PRESETS[base]
    for method in methods:
        changes = _method(method, name)
        if not any(rule.weight for rule in recipe.rules):
            raise RecipeError(f"recipe {base} quantizes no weight that {method} could improve")
        rules = tuple(rule if rule.weight is None else _with_method(rule, changes) for rule in recipe.rules)
        recipe = replace(recipe, name=name, rules=rules)
    return recipe


def _method(method: str, name: str) -> dict[str, Any]:
    """What a suffix of a recipe's name changes in its rules."""
    if method in WEIGHT_METHODS:
        return {"methods": (method,)}
    if method.startswith("smooth") and (found := re.fullmatch(r"smooth(0|1|1\.0+|0?\.[0-9]+)?", method)):
        return {"smooth": float(found[1]) if found[1] else "search"}
    if (found := re.fullmatch(r"lorc([1-9][0-9]*|-auto)?", method)) is None:
        fix = f"use {', '.join(WEIGHT_METHODS)}, smooth, smooth<alpha>, lorc, lorc<rank> or lorc-auto"
        raise RecipeError(f"unknown method {method!r} in recipe {name!r}", fix=fix)
    return {"lorc_rank": "auto" if found[1] == "-auto" else int(found[1] or LORC_RANK)}


def _with_method(rule: QRule, changes: dict[str, Any]) -> QRule:
    return replace(rule, **{**changes, "methods": (*rule.methods, *changes.get("methods", ()))})


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
