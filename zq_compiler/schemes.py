"""Which numbers a tensor may hold, and the shape of its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .errors import RecipeError


class Granularity(StrEnum):
    """How many elements share a scale.

    One invariant covers them all: `scale.ndim == x.ndim` and `x.shape[i] % scale.shape[i] == 0`.
    """

    PER_TENSOR = "per_tensor"  # [1, ..., 1]
    PER_TOKEN = "per_token"  # activation [..., T, 1]
    PER_CHANNEL = "per_channel"  # weight [N, 1]
    PER_FEATURE = "per_feature"  # activation [..., 1, K]


@dataclass(frozen=True)
class QScheme:
    """How one tensor is quantized: symmetric integers of `bits` bits, one scale per `granularity`.

    Args:
        bits: 8.
        granularity: which elements share a scale.
        dynamic: the range is taken at run time, from the tensor itself (activations), instead of ahead of time.
        rotated: blocks of 16 features are rotated first, so that outliers do not set the range; see `numerics.rotate`.
            Both operands of a layer are, or neither. A layer whose input features do not divide by 16 is not rotated.

    Raises:
        RecipeError: for a combination that has no meaning.

    >>> QScheme(granularity=Granularity.PER_TOKEN, dynamic=True).describe()
    'int8 per_token dynamic'
    """

    bits: int = 8
    granularity: Granularity = Granularity.PER_CHANNEL
    dynamic: bool = False
    rotated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", _granularity(self.granularity))
        for flag in ("dynamic", "rotated"):
            if not isinstance(getattr(self, flag), bool):
                raise RecipeError(f"{flag} must be True or False, got {getattr(self, flag)!r}")
        if self.bits != 8:
            raise RecipeError(f"{self.bits}-bit integers are not supported", fix="use bits=8")
        if self.granularity is Granularity.PER_TOKEN and not self.dynamic:
            raise RecipeError("per_token scales exist at run time only", fix="set dynamic=True")
        if self.granularity in (Granularity.PER_CHANNEL, Granularity.PER_FEATURE) and self.dynamic:
            raise RecipeError(f"{self.granularity.value} scales are static", fix="set dynamic=False")
        if self.rotated and self.calibrated:
            raise RecipeError(f"static {self.granularity.value} values are not rotated", fix="set rotated=False")

    @property
    def calibrated(self) -> bool:
        """Whether its scale comes from calibration data: the static schemes of activations."""
        return self.granularity in (Granularity.PER_TENSOR, Granularity.PER_FEATURE) and not self.dynamic

    def describe(self) -> str:
        """In words, as reports print it."""
        return (
            f"int{self.bits} {self.granularity.value} {'dynamic' if self.dynamic else 'static'}"
            + self.rotated * " rotated"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "bits": self.bits,
            "granularity": self.granularity.value,
            "dynamic": self.dynamic,
            "rotated": self.rotated,
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
