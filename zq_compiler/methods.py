"""Settings of the methods that choose a quantized weight; which layers they apply to is said by a recipe's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from .errors import RecipeError


@dataclass(frozen=True)
class Settings:
    """Plain values, as JSON has them."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `to_dict`; what is not given has its default.

        Raises:
            RecipeError: an unknown key, or a value of the wrong kind or size.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or not set(data) <= set(known):
            raise RecipeError(f"no settings of {cls.__name__}: {data!r}", fix=f"use a mapping of {', '.join(known)}")
        return cls(**data)

    def _require(self, name: str, valid: bool, fix: str) -> None:
        if not valid:
            what = f"{type(self).__name__}: {name}={getattr(self, name)!r}"
            raise RecipeError(what, fix=fix)

    def _require_number(self, name: str, least: float, most: float = float("inf"), kind: type = float) -> None:
        value = getattr(self, name)
        typed = type(value) is int or (kind is float and type(value) is float)
        self._require(
            name, typed and least <= value <= most, f"use {'an int' if kind is int else 'a number'} >= {least}"
        )


@dataclass(frozen=True)
class GPTQ(Settings):
    """GPTQ (2210.17323): columns are rounded one after another, the rest makes up for each one's error.

    Args:
        damping: share of the Hessian's mean diagonal that is added to the diagonal.
        block: columns after which the error is carried to all that follow.
        act_order: columns in the order of their inputs' energy, the largest first. Groups keep their scales.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True

    def __post_init__(self) -> None:
        self._require_number("damping", 0)
        self._require_number("block", 1, kind=int)
        self._require("act_order", isinstance(self.act_order, bool), "use True or False")


@dataclass(frozen=True)
class LKD(Settings):
    """Layer-by-layer knowledge distillation (ZeroQuant, 2206.01861, section 4.3): each transformer layer, fed what the
    float model feeds it, is trained to give what the float model gives. Weights alone are trained; scales stay.

    Args:
        steps: optimizer steps for each layer.
        learning_rate: of AdamW at first, falling to zero along a line, in steps of the grid, so that one fits all
            weights and formats. (The paper's is 5e-6 of the weights themselves, and constant.)
        batch: calibration batches of a step.
        weight_decay: of AdamW.
        data: `"calibration"`, or `"random"`: the same calls with random tokens in place of theirs.
        seed: of the order of batches, and of random tokens.
    """

    steps: int = 100
    learning_rate: float = 0.01
    batch: int = 1
    weight_decay: float = 0.0
    data: str = "calibration"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            self._require_number(name, 1, kind=int)
        self._require_number("seed", 0, kind=int)
        self._require_number("learning_rate", 0)
        self._require_number("weight_decay", 0)
        self._require("data", self.data in ("calibration", "random"), "use 'calibration' or 'random'")


@dataclass(frozen=True)
class LoRC(Settings):
    """Low-rank compensation (ZeroQuant-V2, 2303.08302).

    Args:
        energy: of the error's squared norm, the share that rank `"auto"` reaches with as few ranks as it can.
        budget: bytes of a layer's factors, as a share of its quantized weight's, that rank `"auto"` never exceeds.
        factors: `"float16"`, or `"int8"` with a scale for each row of U and each row of V.
        weighted: by the inputs: the best approximation of what the error does to them, not of the error itself.
        refinements: times that the weight without the branch is rounded anew and the branch refitted (MiLo,
            2504.02658).
    """

    energy: float = 0.5
    budget: float = 0.25
    factors: str = "float16"
    weighted: bool = False
    refinements: int = 0

    def __post_init__(self) -> None:
        self._require_number("energy", 0, 1)
        self._require_number("budget", 0)
        self._require("factors", self.factors in ("float16", "int8"), "use 'float16' or 'int8'")
        self._require("weighted", isinstance(self.weighted, bool), "use True or False")
        self._require_number("refinements", 0, kind=int)
