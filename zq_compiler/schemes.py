"""Which numbers a tensor may hold, and the shape of its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .errors import RecipeError
from .formats import format_of
from .numerics import SCALE_CONSTRAINTS, SCALE_ROUNDINGS, WHOLE


class Granularity(StrEnum):
    """How many elements share a scale.

    One invariant covers all but the last: `scale.ndim == x.ndim` and `x.shape[i] % scale.shape[i] == 0`.
    """

    PER_TENSOR = "per_tensor"  # [1, ..., 1]; weight [N, 1], all alike
    PER_TOKEN = "per_token"  # activation [..., T, 1]
    PER_CHANNEL = "per_channel"  # weight [N, 1]
    PER_FEATURE = "per_feature"  # activation [..., 1, K]
    PER_GROUP = "per_group"  # weight [N, ceil(K / group)]: the last group may have less


MIN_GROUP = 16


@dataclass(frozen=True)
class QScheme:
    """How one tensor is quantized: to the values of a format, one scale per `granularity`.

    Args:
        format: one of `formats.FORMATS`. Activations are `"int8"`, `"fp8_e4m3"` per token or tensor, or
            `"int4"` per token.
        granularity: which elements share a scale.
        group: input features that share a scale where it is per group, a power of two; 0 elsewhere.
        dynamic: the range is taken at run time, from the tensor itself (activations), instead of ahead of time.
        rotated: blocks of 16 features are rotated first, so that outliers do not set the range; see `numerics.rotate`.
            Both operands of a layer are, or neither. A layer whose input features do not divide by 16 is not rotated.
        scale_constraint: of a weight's scales: `"none"`, or powers of two, `"pow2"` each on its own and `"group_pow2"`
            times the largest of a row (ZeroQuant-FP's M1 and M2); see `numerics.constrained_scales`.
        scale_rounding: how they become that: `"ceil"`, `"nearest"` or `"floor"`.

    Raises:
        RecipeError: for a combination that has no meaning.

    >>> QScheme(granularity=Granularity.PER_TOKEN, dynamic=True).describe()
    'int8 per_token dynamic'
    >>> QScheme("int4", Granularity.PER_GROUP, group=128).describe()
    'int4 per_group(128) static'
    """

    format: str = "int8"
    granularity: Granularity = Granularity.PER_CHANNEL
    group: int = 0
    dynamic: bool = False
    rotated: bool = False
    scale_constraint: str = "none"
    scale_rounding: str = "ceil"

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", _granularity(self.granularity))
        for flag in ("dynamic", "rotated"):
            if not isinstance(getattr(self, flag), bool):
                raise RecipeError(f"{flag} must be True or False, got {getattr(self, flag)!r}")
        format_of(self.format)
        if self.granularity is Granularity.PER_GROUP:
            if not isinstance(self.group, int) or self.group < MIN_GROUP or self.group & (self.group - 1):
                raise RecipeError(f"group={self.group!r}", fix=f"use a power of two from {MIN_GROUP} on")
        elif self.group != 0:
            raise RecipeError(f"{self.granularity.value} scales have no group", fix="set granularity='per_group'")
        if self.granularity is Granularity.PER_TOKEN and not self.dynamic:
            raise RecipeError("per_token scales exist at run time only", fix="set dynamic=True")
        if self.dynamic and self.granularity not in (Granularity.PER_TENSOR, Granularity.PER_TOKEN):
            raise RecipeError(f"{self.granularity.value} scales are static", fix="set dynamic=False")
        token_wise = self.granularity is Granularity.PER_TOKEN and self.format in ("fp8_e4m3", "int4")
        static_tensor = (
            self.granularity is Granularity.PER_TENSOR and not self.dynamic
        )  # an activation's, or a weight's
        if self.format != "int8" and (self.dynamic or self.calibrated) and not (token_wise or static_tensor):
            what = f"no {self.granularity.value} activations are {self.format}"
            fix = "use format='int8', 'int4' with per_token, or 'fp8_e4m3' with per_token or per_tensor"
            raise RecipeError(what, fix=fix)
        if format_of(self.format).asymmetric and self.scale_constraint != "none":
            raise RecipeError(f"{self.format} has no constrained scales", fix="set scale_constraint='none'")
        if self.rotated and (self.calibrated or not format_of(self.format).is_integer):
            what = f"static {self.granularity.value} values" if self.calibrated else f"{self.format} values"
            raise RecipeError(f"{what} are not rotated", fix="set rotated=False")
        self._check_constraint()

    def _check_constraint(self) -> None:
        choices = {"scale_constraint": SCALE_CONSTRAINTS, "scale_rounding": SCALE_ROUNDINGS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name}={getattr(self, name)!r}", fix=f"use one of {', '.join(known)}")
        if self.scale_constraint != "none" and self.granularity is not Granularity.PER_GROUP:
            raise RecipeError(
                f"{self.granularity.value} scales have no ratios to constrain", fix="set granularity='per_group'"
            )

    @property
    def shared_by(self) -> int:
        """Of a weight: how many input features share a scale, 0 for a row, `numerics.WHOLE` for all rows."""
        return WHOLE if self.granularity is Granularity.PER_TENSOR else self.group

    @property
    def calibrated(self) -> bool:
        """Whether its scale comes from calibration data: the static schemes of activations."""
        return self.granularity in (Granularity.PER_TENSOR, Granularity.PER_FEATURE) and not self.dynamic

    def describe(self) -> str:
        """In words, as reports print it."""
        shared = self.granularity.value + (f"({self.group})" if self.group else "")
        constrained = "" if self.scale_constraint == "none" else f" {self.scale_constraint} {self.scale_rounding}"
        range = "dynamic" if self.dynamic else "static"
        return f"{self.format} {shared} {range}{constrained}" + self.rotated * " rotated"

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "format": self.format,
            "granularity": self.granularity.value,
            "group": self.group,
            "dynamic": self.dynamic,
            "rotated": self.rotated,
            "scale_constraint": self.scale_constraint,
            "scale_rounding": self.scale_rounding,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QScheme:
        """The inverse of `to_dict`; unknown keys are errors."""
        known = cls.__dataclass_fields__
        if not isinstance(data, Mapping) or not set(data) <= set(known):
            raise RecipeError(f"no scheme: {data!r}", fix=f"use a mapping of {', '.join(known)}")
        return cls(**data)


def _granularity(value: Any) -> Granularity:
    try:
        return Granularity(value)
    except ValueError:
        names = ", ".join(g.value for g in Granularity)
        raise RecipeError(f"unknown granularity {value!r}", fix=f"use one of {names}") from None


INT8_WEIGHT = QScheme(granularity=Granularity.PER_CHANNEL)
INT8_TOKEN = QScheme(granularity=Granularity.PER_TOKEN, dynamic=True)
ROTATED_WEIGHT = QScheme(granularity=Granularity.PER_CHANNEL, rotated=True)
ROTATED_TOKEN = QScheme(granularity=Granularity.PER_TOKEN, dynamic=True, rotated=True)
# ZeroQuant-HERO's names: TWQ is INT8_TOKEN, FWQ is INT8_FEATURE, SQ is INT8_TENSOR.
INT8_FEATURE = QScheme(granularity=Granularity.PER_FEATURE)
INT8_TENSOR = QScheme(granularity=Granularity.PER_TENSOR)
FP8_WEIGHT = QScheme("fp8_e4m3", Granularity.PER_CHANNEL)
INT4_TOKEN = QScheme("int4", Granularity.PER_TOKEN, dynamic=True)
FP8_TENSOR = QScheme("fp8_e4m3", Granularity.PER_TENSOR)
FP8_TOKEN = QScheme("fp8_e4m3", Granularity.PER_TOKEN, dynamic=True)
